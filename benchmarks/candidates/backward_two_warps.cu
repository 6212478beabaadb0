// The backward scan, state size 16: see README.md for the identities (w = a g, d(dt) and dA from w h_before).
//
// Two warps own 16 channels x 16 states, each 8 of the states (`side`); a lane has a 2 x 2 tile of them: lane = (g, q) with
// channels 2g, 2g+1 and states 8 side + 2q, 2q+1. Per tile of TILE = 8 steps: recompute h from the state that the forward
// saved, then sweep back. The two share what is done once a channel and step (loads, softplus, gates, finished values), four
// steps of a tile each, and exchange their sums over states.
// All sums are tensor-core products (tf32, 16 x 8 x 8). What a lane holds of a step is a fragment as it stands: summed over
// states as the left factor, with a right one that is zero but in the step's column, so the 8 steps of a tile gather in one
// 16 (channels) x 8 (steps) result (y, dx, ddt). Sums over channels (dB, dC) take two products: one brings the channels across
// the lanes of a row, one adds those up.
// The block's warps share B and C (float32) and add up each other's dB, dC in fixed order; they hand over by mbarriers in
// a ring of RING tiles, so a pair may run a tile ahead of the slowest.
#define PAIRS (WARPS / 2)

struct __align__(16) Pairs {
  Stage stage[2];
  float dt[TILE][CHANNELS], dtx[TILE][CHANNELS], dy[TILE][CHANNELS];
#if HAS_Z
  float sig[TILE][CHANNELS];
#endif
  float2 of_lane[2][4][32];  // by side: skip, bias, the sums for dD and d(bias)
#if H_SHARED
  float4 h[TILE][2][32];  // by side and lane
#endif
  float2 exchange[2][3][32];  // by side: sums over its states for the other side's steps (dx, ddt, y)
};
struct __align__(16) Shared {
  Pairs pair[PAIRS];
  float BC[RING][TILE][2][8][16];  // row r lies in column_of(r), zeros in the other seven
  float2 unit_column[TILE][8];     // (1, 1) in column_of(r), zeros elsewhere
  float partial[RING][PAIRS][TILE][PARTIAL_ROW];
  u64 ready[RING], done[RING];
};

// total (16 rows x 8 steps) += in the column of `step` (1 there, 0 elsewhere) the sums over the lanes of equal q, of b in rows
// 0-7 and of c in rows 8-15. b, c: a lane's two states 2q, 2q+1. Rows hold the states in the order of `state_of_row`. unit:
// the left factor that copies row q to row q and row q + 4 to row q + 4.
__device__ __forceinline__ int state_of_row(int row) { return 2 * (row & 3) + (row >> 2); }
__device__ __forceinline__ void add_channels(
    float (&total)[4], const float (&b)[2], const float (&c)[2], const float (&unit)[4], float step) {
  float across_b[4] = {}, across_c[4] = {};  // rows 0-7: what the lanes g hold, as columns
  multiply<true, false>(across_b, unit[0], unit[1], unit[2], unit[3], b[0], b[1]);
  multiply<true, false>(across_c, unit[0], unit[1], unit[2], unit[3], c[0], c[1]);
  float sum_b = across_b[0] + across_b[1], sum_c = across_c[0] + across_c[1];
  if (SPLIT) {
    const float high_b = high_part(sum_b), high_c = high_part(sum_c);
    multiply_tf32(total, sum_b - high_b, sum_c - high_c, step);
    sum_b = high_b, sum_c = high_c;
  }
  multiply_tf32(total, sum_b, sum_c, step);
}

// The two warps of a pair meet.
__device__ __forceinline__ void pair_sync(int pair) { barrier_of(1 + pair, 64); }

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

  const int side = warp & 1, pair = warp >> 1;
  Pairs& own = sh.pair[pair];
  const int first = (blockIdx.x * PAIRS + pair) * CHANNELS;
  const int q = lane & 3, g = lane >> 2, own_pair = 2 * g, state = 8 * side + 2 * q;
  // Of four registers, not of two and constants: those would be brought together anew for each product.
  const float none = p.length < 0 ? 1.f : 0.f, nothing = p.channels < 0 ? 1.f : 0.f;  // 0, which the compiler cannot know
  const float unit[4] = {g == q ? 1.f : 0.f, none, g == q + 4 ? 1.f : 0.f, nothing};
  const i64 saves = (p.length + TILE - 1) / TILE;

  float a[2][2], w[2][2], gA[2][2];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      int n = state + i, c = first + 2 * g + j;
      a[i][j] = p.A[(i64)c * 16 + n] * LOG2E;
      gA[i][j] = 0.f;
      w[i][j] = p.ends ? p.ends[((batch * p.chunks + blockIdx.z) * 16 + n) * p.channels + c]
                       : (p.dfinal ? p.dfinal[(batch * p.channels + c) * 16 + n] : 0.f);
#if HAS_RESETS && REVERSE
      if (!p.ends && p.resets[batch * p.length]) w[i][j] = 0.f;
#endif
    }
  float2(*const of_lane)[32] = own.of_lane[side];
  of_lane[0][lane] = of_lane[1][lane] = of_lane[2][lane] = of_lane[3][lane] = make_float2(0.f, 0.f);
#if HAS_D
  of_lane[0][lane] = *(const float2*)(p.D + first + own_pair);
#endif
#if HAS_BIAS
  of_lane[1][lane] = *(const float2*)(p.bias + first + own_pair);
#endif

  // What this lane copies of every tile; the addresses move back by a tile at a time, from the last tile on.
  constexpr int row_copies = (TENSORS * TILE * ROW_COPIES + 63) / 64;
  const char* row_from[row_copies];
  int row_step[row_copies];  // bytes
  const i64 way = REVERSE ? -1 : 1, last = begin + (i64)(tiles - 1) * TILE;
#pragma unroll
  for (int j = 0; j < row_copies; j++) {
    int i = j * 64 + side * 32 + lane, k = i % ROW_COPIES * 16, r = i / ROW_COPIES % TILE, tensor = i / (ROW_COPIES * TILE);
    const T* base = tensor == 0   ? p.x + batch * p.x_batch
                    : tensor == 1 ? p.dt + batch * p.dt_batch
                    : tensor == 2 ? p.dy + batch * p.dy_batch
                                  : p.z + batch * p.z_batch;
    i64 row = tensor == 0 ? p.x_row : tensor == 1 ? p.dt_row : tensor == 2 ? p.dy_row : p.z_row;
    row_from[j] = (const char*)(base + first + (position(last, p.length) + r * way) * row) + k;
    row_step[j] = (int)(-way * TILE * row * (i64)sizeof(T));
  }
  const float* h_from = p.saved + ((batch * saves + last / TILE) * 16 + 8 * side + g) * p.channels + first + q * 4;
  const i64 h_step = (i64)16 * p.channels;
  auto load = [&](int to, int left) {
    Stage& st = own.stage[to];
    copy<16>(&st.h[8 * side + g][q * 4], h_from, 16);
    h_from -= h_step;
#pragma unroll
    for (int j = 0; j < row_copies; j++) {
      int i = j * 64 + side * 32 + lane;
      if (TENSORS * TILE * ROW_COPIES % 64 == 0 || i < TENSORS * TILE * ROW_COPIES)
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
                (lane & 24) + state_of_row(lane & 7);
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

  // The step that this lane prepares and finishes, and where its values of the last tile go, moved back tile by tile.
  const int own_step = 4 * side + q;
  const i64 row = position(last + own_step, p.length);
  i64 out = (batch * p.length + row) * p.channels + first + own_pair;
#if HAS_Z
  T* dz = p.dz + batch * p.dz_batch + row * p.dz_row + first + own_pair;
#endif

  // Where this lane reads and writes shared memory, as bytes from its start.
  const int at_pair = kept((int)((u8*)&own.dt[0][own_pair] - memory));        // its channels, first step
  const int at_BC = kept((int)((u8*)&sh.BC[0][0][0][0][state] - memory));     // its states, first column
  const int at_start = kept((int)((u8*)&own.stage[0].h[state][own_pair] - memory));
  const int at_rows = kept((int)((u8*)&own.stage[0].rows[0][own_step][own_pair] - memory));
  constexpr int ROW = CHANNELS * 4, FIELD = TILE * ROW;  // of dt, dtx, dy, sig
  constexpr int RAW_FIELD = TILE * CHANNELS * (int)sizeof(T);  // of x, dt, dy, z
  const int at_lane = kept((int)((u8*)&of_lane[0][lane] - memory));
  const int at_own = kept((int)((u8*)&own.dt[own_step][own_pair] - memory));
#if H_SHARED
  const int at_h = kept((int)((u8*)&own.h[0][side][lane] - memory));
  constexpr int H_ROW = sizeof(own.h[0]);
#endif
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
        server.add_up<PAIRS>(sh.partial[next], it + AHEAD == RING ? last_left : TILE);
      }
      server.bring(sh.BC[next]);
      __syncwarp();
      barrier_arrive(&sh.ready[next]);
      if (it + AHEAD + 1 < tiles) server.fetch(TILE);
    }
    copy_wait<0>();
    pair_sync(pair);
    if (k > 0) load(~it & 1, TILE);
    copy_commit();
    const int stage = (it & 1) * (int)sizeof(Stage), raw = at_rows + stage;

#if HAS_RESETS
    u32 cut;
    {
      i64 s = s0 + lane, at = REVERSE ? p.length - s : s;
      cut = __ballot_sync(FULL, lane < TILE && s < end && at < p.length && p.resets[batch * p.length + at]);
    }
#endif
    {
      Pair element[TENSORS];
#pragma unroll
      for (int j = 0; j < TENSORS; j++) element[j] = AT(const Pair, raw + j * RAW_FIELD);
      const float2 v = widen(element[0]);
      float2 d = widen(element[1]), u = widen(element[2]);
      const float2 bias = AT(const float2, at_lane + 256);
      d.x += bias.x, d.y += bias.y;
#if SOFTPLUS
      d.x = softplus(d.x), d.y = softplus(d.y);
#endif
      if (own_step >= left) d.x = d.y = 0.f;
#if HAS_Z
      const float2 gate = widen(element[3]), sig = make_float2(sigmoid(gate.x), sigmoid(gate.y));
      u.x *= gate.x * sig.x, u.y *= gate.y * sig.y;
      AT(float2, at_own + 3 * FIELD) = sig;
#endif
      AT(float2, at_own) = d;
      AT(float2, at_own + FIELD) = make_float2(d.x * v.x, d.y * v.y);
      AT(float2, at_own + 2 * FIELD) = u;
    }
    float start[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float2 v = AT(const float2, at_start + stage + i * ROW);
      start[i][0] = v.x, start[i][1] = v.y;
    }
    barrier_wait(&sh.ready[slot], it / RING & 1);
    pair_sync(pair);

    const int BC = at_BC + slot * (int)sizeof(sh.BC[0]), masked = BC + g * 64;

    // Forward over the tile. h waits in registers or, with H_SHARED, in shared memory in the order of a factor.
    float now[2][2] = {{start[0][0], start[0][1]}, {start[1][0], start[1][1]}};
#if !H_SHARED
    float h[TILE][2][2];
#endif
#pragma unroll
    for (int r = 0; r < TILE; r++) {
      const float2 d = AT(const float2, at_pair + r * ROW), dx = AT(const float2, at_pair + r * ROW + FIELD);
      const float2 b2 = AT(const float2, BC + (r * 16 + column_of(r)) * 64);
      const float b[2] = {b2.x, b2.y};
      float keep = 1.f;
#if HAS_RESETS
      if (cut >> r & 1) keep = 0.f;
#endif
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float e = ex2((j ? d.y : d.x) * a[i][j]);
#if HAS_RESETS
          e *= keep;
#endif
          now[i][j] = fmaf(e, now[i][j], (j ? dx.y : dx.x) * b[i]);
#if !H_SHARED
          h[r][i][j] = now[i][j];
#endif
        }
#if H_SHARED
      AT(float4, at_h + r * H_ROW) = make_float4(now[0][0], now[0][1], now[1][0], now[1][1]);
#endif
    }

    // Backward over the tile.
    float y[4] = {}, e1[4] = {}, e2[4] = {}, totals[4] = {};
#pragma unroll
    for (int r = TILE - 1; r >= 0; r--) {
      const float2 d = AT(const float2, at_pair + r * ROW), dx = AT(const float2, at_pair + r * ROW + FIELD),
                   u = AT(const float2, at_pair + r * ROW + 2 * FIELD);
      const float2 b2 = AT(const float2, BC + (r * 16 + column_of(r)) * 64), c2 = AT(const float2, BC + (r * 16 + 8 + column_of(r)) * 64);
      const float b[2] = {b2.x, b2.y}, c[2] = {c2.x, c2.y};
      // B, C and 1 in the step's column, 0 elsewhere
      const float2 mb = AT(const float2, masked + r * 16 * 64), mc = AT(const float2, masked + (r * 16 + 8) * 64);
      const float2 step = sh.unit_column[r][g];
#if H_SHARED
      const float4 h4 = r ? AT(const float4, at_h + (r - 1) * H_ROW) : make_float4(start[0][0], start[0][1], start[1][0], start[1][1]);
      const float before[2][2] = {{h4.x, h4.y}, {h4.z, h4.w}};
#else
      const float(&before)[2][2] = r ? h[r ? r - 1 : 0] : start;
#endif
      float grad[2][2], m[2][2], vB[2], vC[2];
      float keep = 1.f;
#if HAS_RESETS
      if (cut >> r & 1) keep = 0.f;
#endif
#pragma unroll
      for (int i = 0; i < 2; i++) {
        vB[i] = vC[i] = 0.f;
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float dj = j ? d.y : d.x, uj = j ? u.y : u.x;
          grad[i][j] = fmaf(c[i], uj, w[i][j]);
          vB[i] = fmaf(grad[i][j], j ? dx.y : dx.x, vB[i]);
          vC[i] = fmaf(now[i][j], uj, vC[i]);
          w[i][j] = ex2(dj * a[i][j]) * grad[i][j];
#if HAS_RESETS
          w[i][j] *= keep;
#endif
          const float v = w[i][j] * before[i][j];
          gA[i][j] = fmaf(v, dj, gA[i][j]);
          m[i][j] = v * a[i][j];
        }
      }
#if HAS_Z
      multiply<false, !SPLIT>(y, now[0][0], now[0][1], now[1][0], now[1][1], mc.x, mc.y);
#endif
      multiply<false, !SPLIT>(e1, grad[0][0], grad[0][1], grad[1][0], grad[1][1], mb.x, mb.y);
      multiply<false, true>(e2, m[0][0], m[0][1], m[1][0], m[1][1], step.x, step.y);
      add_channels(totals, vB, vC, unit, step.x);
#pragma unroll
      for (int i = 0; i < 2; i++) now[i][0] = before[i][0], now[i][1] = before[i][1];
    }

#pragma unroll
    for (int k2 = 0; k2 < 2; k2++) {  // steps q and q + 4
      float* to = &sh.partial[slot][pair][k2 * 4 + q][8 * side + g];
      to[0] = totals[k2], to[16] = totals[k2 + 2];
    }
    // Of steps q and q + 4 (the second column of a result) a side finishes one; rows are the lane's two channels.
    float2(*exchange)[3][32] = own.exchange;
    exchange[side][0][lane] = side ? make_float2(e1[0], e1[2]) : make_float2(e1[1], e1[3]);
    exchange[side][1][lane] = side ? make_float2(e2[0], e2[2]) : make_float2(e2[1], e2[3]);
#if HAS_Z
    exchange[side][2][lane] = side ? make_float2(y[0], y[2]) : make_float2(y[1], y[3]);
#endif
    pair_sync(pair);
    {
      const bool inside = own_step < left;
      const float2 skip = AT(const float2, at_lane), bias = AT(const float2, at_lane + 256);
      const float2 xv = widen(AT(const Pair, raw)), dv = AT(const float2, at_own), u = AT(const float2, at_own + 2 * FIELD);
      float2 E1 = exchange[side ^ 1][0][lane], E2 = exchange[side ^ 1][1][lane];
      E1.x = (E1.x + (side ? e1[1] : e1[0])) * RESTORE, E1.y = (E1.y + (side ? e1[3] : e1[2])) * RESTORE;
      E2.x = (E2.x + (side ? e2[1] : e2[0])) * (LN2 * RESTORE), E2.y = (E2.y + (side ? e2[3] : e2[2])) * (LN2 * RESTORE);
      float2 grad_dt = make_float2(fmaf(E1.x, xv.x, E2.x), fmaf(E1.y, xv.y, E2.y));
#if SOFTPLUS
      const float2 raw_dt = widen(AT(const Pair, raw + RAW_FIELD));
      grad_dt.x *= sigmoid(raw_dt.x + bias.x), grad_dt.y *= sigmoid(raw_dt.y + bias.y);
#endif
      if (!inside) grad_dt = make_float2(0.f, 0.f);
      float2 sum_D = AT(float2, at_lane + 512), sum_bias = AT(float2, at_lane + 768);
      sum_D.x = fmaf(u.x, xv.x, sum_D.x), sum_D.y = fmaf(u.y, xv.y, sum_D.y);
      sum_bias.x += grad_dt.x, sum_bias.y += grad_dt.y;
      AT(float2, at_lane + 512) = sum_D, AT(float2, at_lane + 768) = sum_bias;
      const float2 grad_x = make_float2(fmaf(E1.x, dv.x, skip.x * u.x), fmaf(E1.y, dv.y, skip.y * u.y));
#if HAS_Z
      float2 Y = exchange[side ^ 1][2][lane];
      Y.x = (Y.x + (side ? y[1] : y[0])) * RESTORE, Y.y = (Y.y + (side ? y[3] : y[2])) * RESTORE;
      const float2 gate = widen(AT(const Pair, raw + 3 * RAW_FIELD)), dy = widen(AT(const Pair, raw + 2 * RAW_FIELD)),
                   s = AT(const float2, at_own + 3 * FIELD);
      const float2 grad_z = make_float2(dy.x * fmaf(skip.x, xv.x, Y.x) * s.x * fmaf(gate.x, 1.f - s.x, 1.f),
                                        dy.y * fmaf(skip.y, xv.y, Y.y) * s.y * fmaf(gate.y, 1.f - s.y, 1.f));
      if (inside) store_pair(dz, grad_z.x, grad_z.y);
#endif
      if (inside) store_pair(p.dx + out, grad_x.x, grad_x.y);
      if (inside) store_pair(p.ddt + out, grad_dt.x, grad_dt.y);
    }
    out -= TILE * way * p.channels;
#if HAS_Z
    dz -= TILE * way * p.dz_row;
#endif
    __syncwarp();
    barrier_arrive(&sh.done[slot]);
  }
  for (int it = max(tiles - RING, 0); it < tiles; it++) {
    barrier_wait(&sh.done[it % RING], it / RING & 1);
    server.add_up<PAIRS>(sh.partial[it % RING], it ? TILE : last_left);
  }

  // (batch * chunks, 18, channels): dA by state, then dD and the gradient of the step's bias
  float* sums = p.sums + ((batch * p.chunks + blockIdx.z) * 18) * p.channels + first;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int n = state + i;
    *(float2*)&sums[(i64)n * p.channels + 2 * g] = make_float2(gA[i][0], gA[i][1]);
    if (begin == 0 && p.dinitial) {
      p.dinitial[(batch * p.channels + first + 2 * g) * 16 + n] = w[i][0];
      p.dinitial[(batch * p.channels + first + 2 * g + 1) * 16 + n] = w[i][1];
    }
  }
  float2 sum_D = of_lane[2][lane], sum_bias = of_lane[3][lane];
#pragma unroll
  for (int by = 1; by < 4; by *= 2) {
    sum_D.x += __shfl_xor_sync(FULL, sum_D.x, by), sum_D.y += __shfl_xor_sync(FULL, sum_D.y, by);
    sum_bias.x += __shfl_xor_sync(FULL, sum_bias.x, by), sum_bias.y += __shfl_xor_sync(FULL, sum_bias.y, by);
  }
  pair_sync(pair);  // the last sums have been read
  if (side) own.exchange[0][0][lane] = sum_D, own.exchange[0][1][lane] = sum_bias;
  pair_sync(pair);
  if (!side && q == 0) {
    const float2 other_D = own.exchange[0][0][lane], other_bias = own.exchange[0][1][lane];
    *(float2*)&sums[(i64)16 * p.channels + own_pair] = make_float2(sum_D.x + other_D.x, sum_D.y + other_D.y);
    *(float2*)&sums[(i64)17 * p.channels + own_pair] = make_float2(sum_bias.x + other_bias.x, sum_bias.y + other_bias.y);
  }
}
