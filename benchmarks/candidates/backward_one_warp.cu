// The backward scan, state size 16: see README.md for the identities (w = a g, d(dt) and dA from w h_before).
//
// A warp owns 16 channels x 16 states; a lane a 4 x 2 tile of them: lane = (g, q) with channels 2g, 2g+1 and states
// 4q .. 4q+3. Per tile of TILE = 8 steps: recompute h from the state that the forward saved, then sweep back.
// All sums are tensor-core products (tf32, 16 x 8 x 8). What a lane holds of a step is a fragment as it stands: summed over
// states as the left factor, with a right one that is zero but in the step's column, so the 8 steps of a tile gather in one
// 16 (channels) x 8 (steps) result (y, dx, ddt), which a lane finishes for channels 2g, 2g+1 at steps q, q+4. Sums over
// channels (dB, dC) take two products: one brings the channels across the lanes of a row, one adds those up.
// The block's warps share B and C (float32) and add up each other's dB, dC in fixed order; they hand over by mbarriers in
// a ring of RING tiles, so a warp may run a tile ahead of the slowest.
struct __align__(16) Warp {
  Stage stage[2];
  float dt[TILE][CHANNELS], dtx[TILE][CHANNELS], dy[TILE][CHANNELS];
#if HAS_Z
  float sig[TILE][CHANNELS];
#endif
};
struct __align__(16) Shared {
  Warp warp[WARPS];
  float BC[RING][TILE][2][8][16];  // row r lies in column_of(r), zeros in the other seven
  float2 unit_column[TILE][8];     // (1, 1) in column_of(r), zeros elsewhere
  float partial[RING][WARPS][TILE][PARTIAL_ROW];
  u64 ready[RING], done[RING];
};

// total (16 rows x 8 steps) += in the column of `step` (1 there, 0 elsewhere) the sums of v over the lanes of equal q.
// v: a lane's states 4q .. 4q+3. Rows hold the states in the order of `state_of_row`. unit: the left factor that copies row
// q to row q and row q + 4 to row q + 4.
__device__ __forceinline__ int state_of_row(int row) { return 4 * (row & 3) + (row >> 2); }
__device__ __forceinline__ void add_channels(float (&total)[4], const float (&v)[4], const float (&unit)[4], float step) {
  float low[4] = {}, high[4] = {};  // rows 0-7 of either: what slots 0, 1 and slots 2, 3 of the lanes g hold, as columns
  multiply<true, false>(low, unit[0], unit[1], unit[2], unit[3], v[0], v[1]);
  multiply<true, false>(high, unit[0], unit[1], unit[2], unit[3], v[2], v[3]);
  float a = low[0] + low[1], b = high[0] + high[1];
  if (SPLIT) {
    const float c = high_part(a), d = high_part(b);
    multiply_tf32(total, a - c, b - d, step);
    a = c, b = d;
  }
  multiply_tf32(total, a, b, step);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_backward(const __grid_constant__ Parameters p) {
  u8* const memory = dynamic_shared();
  Shared& sh = *(Shared*)memory;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const i64 batch = blockIdx.y;
  const i64 begin = (i64)blockIdx.z * p.chunk, end = min(begin + p.chunk, p.length);
  const int tiles = (int)((end - begin + TILE - 1) / TILE);
  if (threadIdx.x == 0) {
    for (int i = 0; i < RING; i++) barrier_init(&sh.ready[i], 32 * WARPS), barrier_init(&sh.done[i], 32 * WARPS);
  }
  for (int i = threadIdx.x; i < (int)(sizeof(sh.BC) / sizeof(float)); i += 32 * WARPS) ((float*)sh.BC)[i] = 0.f;
  for (int i = threadIdx.x; i < TILE * 8; i += 32 * WARPS) {
    const float v = i % 8 == column_of(i / 8) ? 1.f : 0.f;
    sh.unit_column[i / 8][i % 8] = make_float2(v, v);
  }
  __syncthreads();

  Warp& own = sh.warp[warp];
  const int first = (blockIdx.x * WARPS + warp) * CHANNELS;
  const int q = lane & 3, g = lane >> 2, own_pair = 2 * g;
  // Of four registers, not of two and constants: those would be brought together anew for each product.
  const float none = p.length < 0 ? 1.f : 0.f, nothing = p.channels < 0 ? 1.f : 0.f;  // 0, which the compiler cannot know
  const float unit[4] = {g == q ? 1.f : 0.f, none, g == q + 4 ? 1.f : 0.f, nothing};
  const i64 saves = (p.length + TILE - 1) / TILE;

  float a[4][2], w[4][2], gA[4][2];
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      int n = 4 * q + i, c = first + 2 * g + j;
      a[i][j] = p.A[(i64)c * 16 + n] * LOG2E;
      gA[i][j] = 0.f;
      w[i][j] = p.ends ? p.ends[((batch * p.chunks + blockIdx.z) * 16 + n) * p.channels + c]
                       : (p.dfinal ? p.dfinal[(batch * p.channels + c) * 16 + n] : 0.f);
#if HAS_RESETS && REVERSE
      if (!p.ends && p.resets[batch * p.length]) w[i][j] = 0.f;
#endif
    }
  float2 skip = make_float2(0.f, 0.f), bias = skip, sum_D = skip, sum_bias = skip;
#if HAS_D
  skip = *(const float2*)(p.D + first + own_pair);
#endif
#if HAS_BIAS
  bias = *(const float2*)(p.bias + first + own_pair);
#endif

  // What this lane copies of every tile; the addresses move back by a tile at a time, from the last tile on.
  constexpr int row_copies = (TENSORS * TILE * ROW_COPIES + 31) / 32;
  const char* row_from[row_copies];
  i64 row_step[row_copies];
  const i64 way = REVERSE ? -1 : 1, last = begin + (i64)(tiles - 1) * TILE;
#pragma unroll
  for (int j = 0; j < row_copies; j++) {
    int i = j * 32 + lane, k = i % ROW_COPIES * 16, r = i / ROW_COPIES % TILE, tensor = i / (ROW_COPIES * TILE);
    const T* base = tensor == 0   ? p.x + batch * p.x_batch
                    : tensor == 1 ? p.dt + batch * p.dt_batch
                    : tensor == 2 ? p.dy + batch * p.dy_batch
                                  : p.z + batch * p.z_batch;
    i64 row = tensor == 0 ? p.x_row : tensor == 1 ? p.dt_row : tensor == 2 ? p.dy_row : p.z_row;
    row_from[j] = (const char*)(base + first + (position(last, p.length) + r * way) * row) + k;
    row_step[j] = -way * TILE * row * (i64)sizeof(T);
  }
  const float* h_from = p.saved + ((batch * saves + last / TILE) * 16 + lane / 4) * p.channels + first + lane % 4 * 4;
  const i64 h_row = (i64)8 * p.channels, h_step = (i64)16 * p.channels;
  auto load = [&](int to, int left) {
    Stage& st = own.stage[to];
    copy<16>(&st.h[lane / 4][lane % 4 * 4], h_from, 16);
    copy<16>(&st.h[8 + lane / 4][lane % 4 * 4], h_from + h_row, 16);
    h_from -= h_step;
#pragma unroll
    for (int j = 0; j < row_copies; j++) {
      int i = j * 32 + lane;
      if (TENSORS * TILE * ROW_COPIES % 32 == 0 || i < TENSORS * TILE * ROW_COPIES)
        copy<16>((char*)st.rows + i * 16, row_from[j], i / ROW_COPIES % TILE < left ? 16 : 0);
      row_from[j] += row_step[j];
    }
  };
  load(0, (int)(end - last));
  copy_commit();

  const int group = first / (p.channels / p.groups);
  Server server;
  {
    const bool is_C = lane & 8;
    const i64 row = is_C ? p.C_row : p.B_row, start = position(last + (lane >> 4) * WARPS + warp, p.length);
    server.from = (is_C ? p.C + batch * p.C_batch : p.B + batch * p.B_batch) + group * 16 + start * row + (lane & 7) * 2;
    server.from_tile = (int)(-way * TILE * row), server.from_row = (int)(way * WARPS * row);
    server.to = p.dBC + ((batch * gridDim.x + blockIdx.x) * p.length + position(last + warp, p.length)) * 32 +
                (lane & 16) + state_of_row(lane & 15);
    server.to_tile = (int)(-way * TILE * 32), server.to_row = (int)(way * WARPS * 32);
    server.warp = warp, server.lane = lane;
  }
  const int last_left = (int)(end - last);
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (i < tiles) {
      server.fetch(i ? TILE : last_left);
      server.bring(sh.BC[i]);
      __syncwarp();
      barrier_arrive(&sh.ready[i]);
    }
  if (AHEAD < tiles) server.fetch(TILE);

  // Where this lane's finished values go: step q of the last tile, moved back tile by tile; step q + 4 is `half` further.
  const i64 row = position(last + q, p.length), half = 4 * way;
  T *dx = p.dx + (batch * p.length + row) * p.channels + first + own_pair,
    *ddt = p.ddt + (batch * p.length + row) * p.channels + first + own_pair;
#if HAS_Z
  T* dz = p.dz + batch * p.dz_batch + row * p.dz_row + first + own_pair;
#endif

  // Where this lane reads and writes shared memory, as bytes from its start.
  const int at_pair = kept((int)((u8*)&own.dt[0][own_pair] - memory));        // its channels, first step
  const int at_BC = kept((int)((u8*)&sh.BC[0][0][0][0][4 * q] - memory));     // its states, first column
  const int at_start = kept((int)((u8*)&own.stage[0].h[4 * q][own_pair] - memory));
  const int at_rows = kept((int)((u8*)&own.stage[0].rows[0][q][own_pair] - memory));
  constexpr int ROW = CHANNELS * 4, FIELD = TILE * ROW;       // of dt, dtx, dy, sig
  constexpr int RAW_ROW = CHANNELS * (int)sizeof(T), RAW_FIELD = TILE * RAW_ROW;  // of x, dt, dy, z
#define AT(type, offset) (*(type*)(memory + (offset)))

  int slot = 0;
  for (int it = 0; it < tiles; it++, slot = slot + 1 == RING ? 0 : slot + 1) {
    const int k = tiles - 1 - it;
    const i64 s0 = begin + (i64)k * TILE;
    const int left = it ? TILE : last_left;
    if (it + AHEAD < tiles) {  // that slot last served tile it + AHEAD - RING
      const int next = slot + AHEAD >= RING ? slot + AHEAD - RING : slot + AHEAD;
      if (it + AHEAD >= RING) {
        barrier_wait(&sh.done[next], (it + AHEAD - RING) / RING & 1);
        server.add_up<WARPS>(sh.partial[next], it + AHEAD == RING ? last_left : TILE);
      }
      server.bring(sh.BC[next]);
      __syncwarp();
      barrier_arrive(&sh.ready[next]);
      if (it + AHEAD + 1 < tiles) server.fetch(TILE);
    }
    copy_wait<0>();
    __syncwarp();
    if (k > 0) load(~it & 1, TILE);
    copy_commit();
    const int stage = (it & 1) * (int)sizeof(Stage), raw_rows = at_rows + stage, fields = at_pair + q * ROW;

#if HAS_RESETS
    u32 cut;
    {
      i64 s = s0 + lane, at = REVERSE ? p.length - s : s;
      cut = __ballot_sync(FULL, lane < TILE && s < end && at < p.length && p.resets[batch * p.length + at]);
    }
#endif
    {  // all loads first: the compiler may not move them over the stores
      Pair raw[TENSORS][2];
      float2 d[2], v[2], u[2];
#if HAS_Z
      float2 sig[2];
#endif
#pragma unroll
      for (int j = 0; j < TENSORS; j++)
#pragma unroll
        for (int k2 = 0; k2 < 2; k2++) raw[j][k2] = AT(const Pair, raw_rows + j * RAW_FIELD + k2 * 4 * RAW_ROW);
#pragma unroll
      for (int k2 = 0; k2 < 2; k2++) {
        v[k2] = widen(raw[0][k2]), d[k2] = widen(raw[1][k2]), u[k2] = widen(raw[2][k2]);
        d[k2].x += bias.x, d[k2].y += bias.y;
#if SOFTPLUS
        d[k2].x = softplus(d[k2].x), d[k2].y = softplus(d[k2].y);
#endif
        if (k2 * 4 + q >= left) d[k2].x = d[k2].y = 0.f;
#if HAS_Z
        float2 gate = widen(raw[3][k2]);
        sig[k2] = make_float2(sigmoid(gate.x), sigmoid(gate.y));
        u[k2].x *= gate.x * sig[k2].x, u[k2].y *= gate.y * sig[k2].y;
#endif
      }
#pragma unroll
      for (int k2 = 0; k2 < 2; k2++) {
        const int to = fields + k2 * 4 * ROW;
        AT(float2, to) = d[k2];
        AT(float2, to + FIELD) = make_float2(d[k2].x * v[k2].x, d[k2].y * v[k2].y);
        AT(float2, to + 2 * FIELD) = u[k2];
#if HAS_Z
        AT(float2, to + 3 * FIELD) = sig[k2];
#endif
      }
    }
    float start[4][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 v = AT(const float2, at_start + stage + i * ROW);
      start[i][0] = v.x, start[i][1] = v.y;
    }
    barrier_wait(&sh.ready[slot], it / RING & 1);
    __syncwarp();

    const int BC = at_BC + slot * (int)sizeof(sh.BC[0]), masked = BC + g * 64;

    // Forward over the tile: h stays in registers.
    float h[TILE][4][2];
#pragma unroll
    for (int r = 0; r < TILE; r++) {
      const float2 d = AT(const float2, at_pair + r * ROW), dx = AT(const float2, at_pair + r * ROW + FIELD);
      const float4 b4 = AT(const float4, BC + (r * 16 + column_of(r)) * 64);
      const float b[4] = {b4.x, b4.y, b4.z, b4.w};
      float keep = 1.f;
#if HAS_RESETS
      if (cut >> r & 1) keep = 0.f;
#endif
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float e = ex2((j ? d.y : d.x) * a[i][j]);
#if HAS_RESETS
          e *= keep;
#endif
          h[r][i][j] = fmaf(e, r ? h[r ? r - 1 : 0][i][j] : start[i][j], (j ? dx.y : dx.x) * b[i]);
        }
    }

    // Backward over the tile.
    float y[4] = {}, e1[4] = {}, e2[4] = {}, totals[2][4] = {};
#pragma unroll
    for (int r = TILE - 1; r >= 0; r--) {
      const float2 d = AT(const float2, at_pair + r * ROW), dx = AT(const float2, at_pair + r * ROW + FIELD),
                   u = AT(const float2, at_pair + r * ROW + 2 * FIELD);
      const float4 b4 = AT(const float4, BC + (r * 16 + column_of(r)) * 64), c4 = AT(const float4, BC + (r * 16 + 8 + column_of(r)) * 64);
      const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
      // B, C and 1 in the step's column, 0 elsewhere
      const float4 mb4 = AT(const float4, masked + r * 16 * 64), mc4 = AT(const float4, masked + (r * 16 + 8) * 64);
      const float mb[4] = {mb4.x, mb4.y, mb4.z, mb4.w}, mc[4] = {mc4.x, mc4.y, mc4.z, mc4.w};
      const float2 step = sh.unit_column[r][g];
      float grad[4][2], m[4][2], vB[4], vC[4];
      float keep = 1.f;
#if HAS_RESETS
      if (cut >> r & 1) keep = 0.f;
#endif
#pragma unroll
      for (int i = 0; i < 4; i++) {
        vB[i] = vC[i] = 0.f;
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float dj = j ? d.y : d.x, uj = j ? u.y : u.x;
          grad[i][j] = fmaf(c[i], uj, w[i][j]);
          vB[i] = fmaf(grad[i][j], j ? dx.y : dx.x, vB[i]);
          vC[i] = fmaf(h[r][i][j], uj, vC[i]);
          w[i][j] = ex2(dj * a[i][j]) * grad[i][j];
#if HAS_RESETS
          w[i][j] *= keep;
#endif
          const float v = w[i][j] * (r ? h[r ? r - 1 : 0][i][j] : start[i][j]);
          gA[i][j] = fmaf(v, dj, gA[i][j]);
          m[i][j] = v * a[i][j];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
#if HAS_Z
        multiply<false, !SPLIT>(y, h[r][i][0], h[r][i][1], h[r][i + 1][0], h[r][i + 1][1], mc[i], mc[i + 1]);
#endif
        multiply<false, !SPLIT>(e1, grad[i][0], grad[i][1], grad[i + 1][0], grad[i + 1][1], mb[i], mb[i + 1]);
        multiply<false, true>(e2, m[i][0], m[i][1], m[i + 1][0], m[i + 1][1], step.x, step.y);
      }
      add_channels(totals[0], vB, unit, step.x);
      add_channels(totals[1], vC, unit, step.x);
    }

    // What a lane finishes: channels own_pair and the next (second index of the sums: + 2), steps q and q + 4 (+ 1).
#pragma unroll
    for (int k2 = 0; k2 < 2; k2++) {
      const int r = k2 * 4 + q, raw = raw_rows + k2 * 4 * RAW_ROW, field = fields + k2 * 4 * ROW;
      const bool inside = r < left;
      const float2 xv = widen(AT(const Pair, raw)), dv = AT(const float2, field), u = AT(const float2, field + 2 * FIELD);
      const float2 E1 = make_float2(e1[k2] * RESTORE, e1[k2 + 2] * RESTORE);
      float2 grad_dt = make_float2(fmaf(E1.x, xv.x, e2[k2] * (LN2 * RESTORE)), fmaf(E1.y, xv.y, e2[k2 + 2] * (LN2 * RESTORE)));
#if SOFTPLUS
      const float2 raw_dt = widen(AT(const Pair, raw + RAW_FIELD));
      grad_dt.x *= sigmoid(raw_dt.x + bias.x), grad_dt.y *= sigmoid(raw_dt.y + bias.y);
#endif
      if (!inside) grad_dt = make_float2(0.f, 0.f);
      sum_D.x = fmaf(u.x, xv.x, sum_D.x), sum_D.y = fmaf(u.y, xv.y, sum_D.y);
      sum_bias.x += grad_dt.x, sum_bias.y += grad_dt.y;
      const float2 grad_x = make_float2(fmaf(E1.x, dv.x, skip.x * u.x), fmaf(E1.y, dv.y, skip.y * u.y));
#if HAS_Z
      const float2 gate = widen(AT(const Pair, raw + 3 * RAW_FIELD)), dy = widen(AT(const Pair, raw + 2 * RAW_FIELD)),
                   s = AT(const float2, field + 3 * FIELD);
      const float2 grad_z = make_float2(dy.x * fmaf(skip.x, xv.x, y[k2] * RESTORE) * s.x * fmaf(gate.x, 1.f - s.x, 1.f),
                                        dy.y * fmaf(skip.y, xv.y, y[k2 + 2] * RESTORE) * s.y * fmaf(gate.y, 1.f - s.y, 1.f));
      if (inside) store_pair(dz + k2 * half * p.dz_row, grad_z.x, grad_z.y);
#endif
      if (inside) store_pair(dx + k2 * half * p.channels, grad_x.x, grad_x.y);
      if (inside) store_pair(ddt + k2 * half * p.channels, grad_dt.x, grad_dt.y);
#pragma unroll
      for (int which = 0; which < 2; which++) {
        float* to = &sh.partial[slot][warp][r][which * 16 + g];
        to[0] = totals[which][k2];
        to[8] = totals[which][k2 + 2];
      }
    }
    dx -= TILE * way * p.channels, ddt -= TILE * way * p.channels;
#if HAS_Z
    dz -= TILE * way * p.dz_row;
#endif
    __syncwarp();
    barrier_arrive(&sh.done[slot]);
  }
  for (int it = max(tiles - RING, 0); it < tiles; it++) {
    barrier_wait(&sh.done[it % RING], it / RING & 1);
    server.add_up<WARPS>(sh.partial[it % RING], it ? TILE : last_left);
  }

  // (batch * chunks, 18, channels): dA by state, then dD and the gradient of the step's bias
  float* sums = p.sums + ((batch * p.chunks + blockIdx.z) * 18) * p.channels + first;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int n = 4 * q + i;
    *(float2*)&sums[(i64)n * p.channels + 2 * g] = make_float2(gA[i][0], gA[i][1]);
    if (begin == 0 && p.dinitial) {
      p.dinitial[(batch * p.channels + first + 2 * g) * 16 + n] = w[i][0];
      p.dinitial[(batch * p.channels + first + 2 * g + 1) * 16 + n] = w[i][1];
    }
  }
#pragma unroll
  for (int by = 1; by < 4; by *= 2) {
    sum_D.x += __shfl_xor_sync(FULL, sum_D.x, by), sum_D.y += __shfl_xor_sync(FULL, sum_D.y, by);
    sum_bias.x += __shfl_xor_sync(FULL, sum_bias.x, by), sum_bias.y += __shfl_xor_sync(FULL, sum_bias.y, by);
  }
  if (q == 0) {
    *(float2*)&sums[(i64)16 * p.channels + own_pair] = sum_D;
    *(float2*)&sums[(i64)17 * p.channels + own_pair] = sum_bias;
  }
}
