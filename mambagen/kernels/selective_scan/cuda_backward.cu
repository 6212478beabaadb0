// The backward scan, state size 16: see README.md for the identities (w = a g, d(dt) and dA from w h_before).
//
// A warp owns 16 channels x 16 states; a lane a 4 x 2 tile of them: lane = (g, q) with channels 2g, 2g+1 and states
// 4q .. 4q+3, stored in the order 4q + (slot ^ (g & 3)), so that the sums over channels halve over lanes without selects.
// Per tile of TILE steps: recompute h from the state that the forward saved, then sweep back. Sums over states (y, dx, ddt)
// end in the lane that owns (channel, step) and are finished there; sums over channels (dB, dC) go to shared memory.
// The block's warps share B and C (float32, in the four slot orders) and add up each other's dB, dC in fixed order; they
// hand over by mbarriers in a ring of RING tiles, so a warp may run a tile ahead of the slowest.
struct Parameters {
  const T *x, *dt, *z, *B, *C, *dy;
  const float *A, *D, *bias, *saved, *dfinal, *ends;
  const u8* resets;
  T *dx, *ddt, *dz;
  float *dBC, *sums, *dinitial;
  i64 x_batch, x_row, dt_batch, dt_row, z_batch, z_row, B_batch, B_row, C_batch, C_row, dy_batch, dy_row, dz_batch, dz_row;
  i64 length;
  int channels, groups, chunk, chunks;
};

#define CHANNELS 16
#define ROW_COPIES (CHANNELS * (int)sizeof(T) / 16)
#define AHEAD (RING / 2)  // tiles that B and C are brought ahead

#define TENSORS (3 + HAS_Z)

// Shared memory has 32 banks of a float. Where 16 lanes read h, each two channels of a state: the two low bits of the
// state change places, and the four quads of channels are permuted by the two high bits, so that no two of them meet.
__device__ __forceinline__ int h_row(int n) { return (n & ~3) | (n & 1) << 1 | (n >> 1 & 1); }
__device__ __forceinline__ int h_column(int n, int c) { return c ^ (n >> 2) << 2; }
// C's slot orders lie pairwise exchanged, half of the banks from B's, as a half warp writes both.
#define C_ORDER(order) ((order) ^ 1)

struct __align__(16) Stage {
  float h[16][CHANNELS];            // [h_row(n)][h_column(n, c)]
  T rows[TENSORS][TILE][CHANNELS];  // x, dt, dy, z
};
struct __align__(16) Warp {
  Stage stage[2];
  float dt[TILE][CHANNELS], dtx[TILE][CHANNELS], dy[TILE][CHANNELS];
#if HAS_Z
  float sig[TILE][CHANNELS];
#endif
};
struct __align__(16) Shared {
  Warp warp[WARPS];
  float BC[RING][TILE][2][4][16];
  float partial[RING][WARPS][TILE][32];
  u64 ready[RING], done[RING];
};

__device__ __forceinline__ i64 position(i64 s, i64 length) { return REVERSE ? length - 1 - s : s; }

// The block's common work is shared out by rows of a tile: warp w brings rows w, w + WARPS, ... of B and C and adds up
// the same rows of all warps' dB and dC.
#define ROWS (TILE / WARPS)
struct Server {
  const T *B, *C;
  i64 B_row, C_row, begin, end, length;
  float* dBC;
  int warp, lane;
  Pair next[(ROWS + 1) / 2];

  // Lanes 0-7 of a half warp hold B's pairs of states, 8-15 C's; a warp handles two rows at once.
  __device__ __forceinline__ void fetch(int k) {
    i64 s0 = begin + (i64)k * TILE;
    bool is_C = lane & 8;
    int n = (lane & 7) * 2;
#pragma unroll
    for (int j = 0; j < (ROWS + 1) / 2; j++) {
      int row = 2 * j + (lane >> 4);
      i64 s = s0 + row * WARPS + warp;
      next[j] = Pair();
      if (row < ROWS && s < end) {
        i64 t = position(s, length);
        next[j] = *(const Pair*)(is_C ? C + t * C_row + n : B + t * B_row + n);
      }
    }
  }
  __device__ __forceinline__ void bring(float (*BC)[2][4][16]) {
    int n = (lane & 7) * 2, which = lane >> 3 & 1;
#pragma unroll
    for (int j = 0; j < (ROWS + 1) / 2; j++) {
      int row = 2 * j + (lane >> 4);
      if (row < ROWS) {
        const float2 v = widen(next[j]);
#pragma unroll
        for (int order = 0; order < 4; order++) {
          int at = (n & ~3) | ((n & 2) ^ (order & 2));
          *(float2*)&BC[row * WARPS + warp][which][which ? C_ORDER(order) : order][at] = order & 1 ? make_float2(v.y, v.x) : v;
        }
      }
    }
  }
  __device__ __forceinline__ void add_up(const float (*partial)[TILE][32], int k) {
    i64 s0 = begin + (i64)k * TILE;
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
      int r = j * WARPS + warp;
      float sum = 0.f;
#pragma unroll
      for (int v = 0; v < WARPS; v++) sum += partial[v][r][lane];
      if (s0 + r < end) dBC[position(s0 + r, length) * 32 + lane] = sum;
    }
  }
};

// The sum over the four lanes that share two channels, for two steps at once: v is [step][slot], and lane (b0, b1) of the
// four ends with the value of channel b0 at step b1.
__device__ __forceinline__ float gather(const float (&v)[2][2], bool b0, bool b1) {
  float s0 = (b0 ? v[0][1] : v[0][0]) + __shfl_xor_sync(FULL, b0 ? v[0][0] : v[0][1], 1);
  float s1 = (b0 ? v[1][1] : v[1][0]) + __shfl_xor_sync(FULL, b0 ? v[1][0] : v[1][1], 1);
  return (b1 ? s1 : s0) + __shfl_xor_sync(FULL, b1 ? s0 : s1, 2);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_backward(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(16) u8 raw_shared[];
  Shared& sh = *(Shared*)raw_shared;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const i64 batch = blockIdx.y;
  const i64 begin = (i64)blockIdx.z * p.chunk, end = min(begin + p.chunk, p.length);
  const int tiles = (int)((end - begin + TILE - 1) / TILE);
  if (threadIdx.x == 0) {
    for (int i = 0; i < RING; i++) barrier_init(&sh.ready[i], 32 * WARPS), barrier_init(&sh.done[i], 32 * WARPS);
  }
  __syncthreads();

  Warp& own = sh.warp[warp];
  const int first = (blockIdx.x * WARPS + warp) * CHANNELS;
  const int q = lane & 3, g = lane >> 2, order = g & 3;
  const bool b0 = lane & 1, b1 = lane & 2;
  const int local = 2 * g + b0;  // the channel whose sums end in this lane, at the step r with (r & 1) == b1
  const i64 saves = (p.length + TILE - 1) / TILE;

  float a[4][2], w[4][2], gA[4][2];
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      int n = 4 * q + (i ^ order), c = first + 2 * g + j;
      a[i][j] = p.A[(i64)c * 16 + n] * LOG2E;
      gA[i][j] = 0.f;
      w[i][j] = p.ends ? p.ends[((batch * p.chunks + blockIdx.z) * 16 + n) * p.channels + c]
                       : (p.dfinal ? p.dfinal[(batch * p.channels + c) * 16 + n] : 0.f);
#if HAS_RESETS && REVERSE
      if (!p.ends && p.resets[batch * p.length]) w[i][j] = 0.f;
#endif
    }
  float skip = 0.f, own_bias = 0.f, sum_D = 0.f, sum_bias = 0.f;
#if HAS_D
  skip = p.D[first + local];
#endif
#if HAS_BIAS
  own_bias = p.bias[first + local];
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
  const i64 h_half = (i64)8 * p.channels, h_step = (i64)16 * p.channels;
  auto load = [&](int to, int left) {
    Stage& st = own.stage[to];
    const int n = lane / 4, c = lane % 4 * 4;
    copy<16>(&st.h[h_row(n)][h_column(n, c)], h_from, 16);
    copy<16>(&st.h[h_row(n + 8)][h_column(n + 8, c)], h_from + h_half, 16);
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
  Server server = {p.B + batch * p.B_batch + group * 16, p.C + batch * p.C_batch + group * 16, p.B_row, p.C_row, begin, end, p.length,
                   p.dBC + (batch * gridDim.x + blockIdx.x) * p.length * 32, warp, lane};
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (i < tiles) {
      server.fetch(tiles - 1 - i);
      server.bring(sh.BC[i]);
      __syncwarp();
      barrier_arrive(&sh.ready[i]);
    }
  if (AHEAD < tiles) server.fetch(tiles - 1 - AHEAD);

  const int pair = (lane & 7) * 2, pair_row = lane >> 3;
  float bias0 = 0.f, bias1 = 0.f;
#if HAS_BIAS
  bias0 = p.bias[first + pair], bias1 = p.bias[first + pair + 1];
#endif

  // Where this lane's finished values go: step b1 of the last tile's first pair, moved back pair by pair.
  const i64 to = (batch * p.length + position(last + (TILE - 2) + b1, p.length)) * p.channels + first + local;
  const i64 to_step = -2 * way * p.channels;
  T *dx = p.dx + to, *ddt = p.ddt + to;
#if HAS_Z
  T* dz = p.dz + batch * p.dz_batch + position(last + (TILE - 2) + b1, p.length) * p.dz_row + first + local;
  const i64 dz_step = -2 * way * p.dz_row;
#endif

  int slot = 0;
  for (int it = 0; it < tiles; it++, slot = slot + 1 == RING ? 0 : slot + 1) {
    const int k = tiles - 1 - it;
    const i64 s0 = begin + (i64)k * TILE;
    const int left = it ? TILE : (int)(end - last);
    if (it + AHEAD < tiles) {  // that slot last served tile it + AHEAD - RING
      const int next = slot + AHEAD >= RING ? slot + AHEAD - RING : slot + AHEAD;
      if (it + AHEAD >= RING) {
        barrier_wait(&sh.done[next], (it + AHEAD - RING) / RING & 1);
        server.add_up(sh.partial[next], k - AHEAD + RING);
      }
      server.bring(sh.BC[next]);
      __syncwarp();
      barrier_arrive(&sh.ready[next]);
      if (it + AHEAD + 1 < tiles) server.fetch(k - AHEAD - 1);
    }
    copy_wait<0>();
    __syncwarp();
    if (k > 0) load(~it & 1, TILE);
    copy_commit();
    const Stage& st = own.stage[it & 1];

#if HAS_RESETS
    u32 cut;
    {
      i64 s = s0 + lane, at = REVERSE ? p.length - s : s;
      cut = __ballot_sync(FULL, lane < TILE && s < end && at < p.length && p.resets[batch * p.length + at]);
    }
#endif
    {  // all loads first: the compiler may not move them over the stores
      constexpr int passes = TILE / 4;
      Pair raw[TENSORS][passes];
      float2 d[passes], v[passes], u[passes];
#if HAS_Z
      float2 sig[passes];
#endif
#pragma unroll
      for (int j = 0; j < TENSORS; j++)
#pragma unroll
        for (int k2 = 0; k2 < passes; k2++) raw[j][k2] = *(const Pair*)&st.rows[j][k2 * 4 + pair_row][pair];
#pragma unroll
      for (int k2 = 0; k2 < passes; k2++) {
        v[k2] = widen(raw[0][k2]), d[k2] = widen(raw[1][k2]), u[k2] = widen(raw[2][k2]);
        d[k2].x += bias0, d[k2].y += bias1;
#if SOFTPLUS
        d[k2].x = softplus(d[k2].x), d[k2].y = softplus(d[k2].y);
#endif
        if (k2 * 4 + pair_row >= left) d[k2].x = d[k2].y = 0.f;
#if HAS_Z
        float2 gate = widen(raw[3][k2]);
        sig[k2] = make_float2(sigmoid(gate.x), sigmoid(gate.y));
        u[k2].x *= gate.x * sig[k2].x, u[k2].y *= gate.y * sig[k2].y;
#endif
      }
#pragma unroll
      for (int k2 = 0; k2 < passes; k2++) {
        const int r = k2 * 4 + pair_row;
#if HAS_Z
        *(float2*)&own.sig[r][pair] = sig[k2];
#endif
        const float2 dx = make_float2(d[k2].x * v[k2].x, d[k2].y * v[k2].y);
        *(float2*)&own.dt[r][pair] = d[k2];
        *(float2*)&own.dtx[r][pair] = dx;
        *(float2*)&own.dy[r][pair] = u[k2];
      }
    }
    float start[4][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int n = 4 * q + (i ^ order);
      const float2 v = *(const float2*)&st.h[h_row(n)][h_column(n, 2 * g)];
      start[i][0] = v.x, start[i][1] = v.y;
    }
    barrier_wait(&sh.ready[slot], it / RING & 1);
    __syncwarp();

    // Forward over the tile: h stays in registers.
    float h[TILE][4][2];
#if HAS_Z
    float y[TILE / 2];
#endif
#pragma unroll
    for (int r0 = 0; r0 < TILE; r0 += 2) {
      float sum[2][2];
#pragma unroll
      for (int k2 = 0; k2 < 2; k2++) {
        const int r = r0 + k2;
        const float2 d = *(const float2*)&own.dt[r][2 * g], dx = *(const float2*)&own.dtx[r][2 * g];
        const float4 b4 = *(const float4*)&sh.BC[slot][r][0][order][4 * q];
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
#if HAS_Z
        const float4 c4 = *(const float4*)&sh.BC[slot][r][1][C_ORDER(order)][4 * q];
        const float c[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
        for (int j = 0; j < 2; j++)
          sum[k2][j] = fmaf(h[r][0][j], c[0], h[r][1][j] * c[1]) + fmaf(h[r][2][j], c[2], h[r][3][j] * c[3]);
#endif
      }
#if HAS_Z
      y[r0 / 2] = gather(sum, b0, b1);
#endif
    }

    // Backward over the tile. dB and dC wait in registers: a store among the loads of the next steps would hold them up.
    float totals[TILE];
#pragma unroll
    for (int r0 = TILE - 2; r0 >= 0; r0 -= 2) {
      float e1[2][2], e2[2][2];
#pragma unroll
      for (int k2 = 1; k2 >= 0; k2--) {
        const int r = r0 + k2;
        const float2 d = *(const float2*)&own.dt[r][2 * g], dx = *(const float2*)&own.dtx[r][2 * g],
                     u = *(const float2*)&own.dy[r][2 * g];
        const float4 b4 = *(const float4*)&sh.BC[slot][r][0][order][4 * q], c4 = *(const float4*)&sh.BC[slot][r][1][C_ORDER(order)][4 * q];
        const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
        float vB[4], vC[4];
        float keep = 1.f;
#if HAS_RESETS
        if (cut >> r & 1) keep = 0.f;
#endif
#pragma unroll
        for (int j = 0; j < 2; j++) e1[k2][j] = e2[k2][j] = 0.f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          vB[i] = vC[i] = 0.f;
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const float dj = j ? d.y : d.x, uj = j ? u.y : u.x;
            float grad = fmaf(c[i], uj, w[i][j]);
            e1[k2][j] = fmaf(grad, b[i], e1[k2][j]);
            vB[i] = fmaf(grad, j ? dx.y : dx.x, vB[i]);
            vC[i] = fmaf(h[r][i][j], uj, vC[i]);
            w[i][j] = ex2(dj * a[i][j]) * grad;
#if HAS_RESETS
            w[i][j] *= keep;
#endif
            float m = w[i][j] * (r ? h[r ? r - 1 : 0][i][j] : start[i][j]);
            e2[k2][j] = fmaf(m, a[i][j], e2[k2][j]);
            gA[i][j] = fmaf(m, dj, gA[i][j]);
          }
        }
        // Sums over the warp's 16 channels: slots halve without selects (see the slot order), then dB and dC part ways.
        float B0 = vB[0] + __shfl_xor_sync(FULL, vB[2], 8), B1 = vB[1] + __shfl_xor_sync(FULL, vB[3], 8);
        float C0 = vC[0] + __shfl_xor_sync(FULL, vC[2], 8), C1 = vC[1] + __shfl_xor_sync(FULL, vC[3], 8);
        B0 += __shfl_xor_sync(FULL, B1, 4);
        C0 += __shfl_xor_sync(FULL, C1, 4);
        const bool high = lane & 16;
        totals[r] = (high ? C0 : B0) + __shfl_xor_sync(FULL, high ? B0 : C0, 16);
      }
      const float E1 = gather(e1, b0, b1), E2 = gather(e2, b0, b1) * LN2;
      const int r = r0 + b1;
      const float xv = to_float(st.rows[0][r][local]), dv = own.dt[r][local], u = own.dy[r][local];
      sum_D = fmaf(u, xv, sum_D);
      float grad_dt = fmaf(E1, xv, E2);
#if SOFTPLUS
      grad_dt *= sigmoid(to_float(st.rows[1][r][local]) + own_bias);
#endif
      const bool inside = r < left;
      sum_bias += inside ? grad_dt : 0.f;
      if (inside) *dx = from_float(fmaf(E1, dv, skip * u));
      if (inside) *ddt = from_float(grad_dt);
      dx += to_step, ddt += to_step;
#if HAS_Z
      const float gate = to_float(st.rows[3][r][local]), m = own.sig[r][local];
      const float grad_z = to_float(st.rows[2][r][local]) * fmaf(skip, xv, y[r0 / 2]) * m * fmaf(gate, 1.f - m, 1.f);
      if (inside) *dz = from_float(grad_z);
      dz += dz_step;
#endif
    }
#pragma unroll
    for (int r = 0; r < TILE; r++) sh.partial[slot][warp][r][(lane & 16) + 4 * q + order] = totals[r];
    __syncwarp();
    barrier_arrive(&sh.done[slot]);
  }
  for (int it = max(tiles - RING, 0); it < tiles; it++) {
    barrier_wait(&sh.done[it % RING], it / RING & 1);
    server.add_up(sh.partial[it % RING], tiles - 1 - it);
  }

  // (batch * chunks, 18, channels): dA by state, then dD and the gradient of the step's bias
  float* sums = p.sums + ((batch * p.chunks + blockIdx.z) * 18) * p.channels + first;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int n = 4 * q + (i ^ order);
    *(float2*)&sums[(i64)n * p.channels + 2 * g] = make_float2(gA[i][0], gA[i][1]);
    if (begin == 0 && p.dinitial) {
      p.dinitial[(batch * p.channels + first + 2 * g) * 16 + n] = w[i][0];
      p.dinitial[(batch * p.channels + first + 2 * g + 1) * 16 + n] = w[i][1];
    }
  }
  sum_D += __shfl_xor_sync(FULL, sum_D, 2);
  sum_bias += __shfl_xor_sync(FULL, sum_bias, 2);
  if (!b1) sums[(i64)16 * p.channels + local] = sum_D, sums[(i64)17 * p.channels + local] = sum_bias;
}

// dB and dC: the blocks' partial sums of a group, added in order. One thread four neighbours of (batch, position, 32).
struct Reduction {
  const float* partial;  // (batch, blocks, length, 32)
  T *dB, *dC;            // (batch, length, groups, 16)
  i64 length, total;     // total: batch * length * groups * 8
  int blocks, groups;
};
extern "C" __global__ void __launch_bounds__(256) add_partials(const __grid_constant__ Reduction p) {
  i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
  if (i >= p.total) return;
  int k = (int)(i & 7) * 4;
  i64 row = i >> 3;
  int group = (int)(row % p.groups);
  i64 at = row / p.groups, batch = at / p.length, t = at % p.length;
  int per = p.blocks / p.groups;
  const float* from = p.partial + ((batch * p.blocks + group * per) * p.length + t) * 32 + k;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int j = 0; j < per; j++) {
    float4 v = *(const float4*)(from + (i64)j * p.length * 32);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  T* to = (k < 16 ? p.dB : p.dC) + row * 16 + (k & 15);
  store_pair(to, sum.x, sum.y);
  store_pair(to + 2, sum.z, sum.w);
}
