// The states at chunk borders, for sequences that are cut into chunks because batch x channels do not fill the chip.
//
// ADJOINT 0: what a chunk leaves behind when it starts from zero, sum_s exp(A (dt summed after s)) dt_s x_s B_s.
// ADJOINT 1: what a chunk hands back when nothing comes from behind, sum_s exp(A (dt summed up to s)) C_s dy_s.
// The decay over any stretch is one exponential of the summed steps, so no recurrence is needed: the sums run away from
// the border, and a state is left out as soon as its weight is below 2^FADED: a long chunk costs only as much as its memory
// reaches. What is left out has about that share of the sum, as steps that bring much in also let much fade. `combine` then
// chains the chunks.
struct Parameters {
  const T *x, *dt, *z, *dy, *BC;  // x for ADJOINT 0; dy and z for ADJOINT 1; BC is B or C
  const float *A, *bias;
  const u8* resets;
  float *sums, *totals;  // (batch, chunks, 16, channels), (batch, chunks, channels): summed dt, -1 where a document is cut
  i64 x_batch, x_row, dt_batch, dt_row, z_batch, z_row, dy_batch, dy_row, BC_batch, BC_row;
  i64 length;
  int channels, groups, chunk, chunks;
};

#define CHANNELS 16
#define ROW_COPIES (CHANNELS * (int)sizeof(T) / 16)
#define BC_COPIES (16 * (int)sizeof(T) / BC_VECTOR)
#define TENSORS (ADJOINT ? 2 + HAS_Z : 2)
#define FADED (sizeof(T) == 4 ? -30.f : -24.f)  // float32 keeps 2^-24, bfloat16 2^-8

struct __align__(16) Stage {
  T rows[TENSORS][TILE][CHANNELS];  // dt, then x or dy and z
  T BC[TILE][16];
};
struct __align__(16) Warp {
  Stage stage[STAGES];
  float2 step[TILE][CHANNELS];
  float BC[TILE][16];
};

__device__ __forceinline__ i64 position(i64 s, i64 length) { return REVERSE ? length - 1 - s : s; }

extern "C" __global__ void __launch_bounds__(32 * WARPS) scan_boundary(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(16) u8 shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Warp& own = ((Warp*)shared)[warp];
  const int first = (blockIdx.x * WARPS + warp) * CHANNELS;
  if (first >= p.channels) return;
  const i64 batch = blockIdx.y;
  const int number = blockIdx.z + ADJOINT;  // the last chunk's end and the first one's start are not asked for
  const i64 begin = (i64)number * p.chunk, end = min(begin + p.chunk, p.length);
  const int group = first / (p.channels / p.groups);
  const int part = lane & 1, local = lane >> 1, c = first + local;

  float a[8], sum[8];
#pragma unroll
  for (int i = 0; i < 8; i++) a[i] = p.A[(i64)c * 16 + part * 8 + i] * LOG2E, sum[i] = 0.f;

  // Rows are counted away from the border: row r of the walk is step end-1-r, or begin+r for the adjoint.
  const i64 border = position(ADJOINT ? begin : end - 1, p.length);
  const i64 way = (ADJOINT != 0) == (REVERSE != 0) ? -1 : 1;
  constexpr int row_copies = (TENSORS * TILE * ROW_COPIES + 31) / 32, bc_copies = (TILE * BC_COPIES + 31) / 32;
  const char *row_from[row_copies], *bc_from[bc_copies];
  i64 row_step[row_copies];
#pragma unroll
  for (int j = 0; j < row_copies; j++) {
    int i = j * 32 + lane, k = i % ROW_COPIES * 16, r = i / ROW_COPIES % TILE, tensor = i / (ROW_COPIES * TILE);
    const T* base = tensor == 0 ? p.dt + batch * p.dt_batch
                    : ADJOINT   ? (tensor == 1 ? p.dy + batch * p.dy_batch : p.z + batch * p.z_batch)
                                : p.x + batch * p.x_batch;
    i64 row = tensor == 0 ? p.dt_row : ADJOINT ? (tensor == 1 ? p.dy_row : p.z_row) : p.x_row;
    row_from[j] = (const char*)(base + first + (border + r * way) * row) + k;
    row_step[j] = way * TILE * row * (i64)sizeof(T);
  }
#pragma unroll
  for (int j = 0; j < bc_copies; j++) {
    int i = j * 32 + lane, k = i % BC_COPIES * BC_VECTOR, r = i / BC_COPIES % TILE;
    bc_from[j] = (const char*)(p.BC + batch * p.BC_batch + group * 16 + (border + r * way) * p.BC_row) + k;
  }
  const i64 bc_step = way * TILE * p.BC_row * (i64)sizeof(T);
  auto load = [&](int to, int left) {
#pragma unroll
    for (int j = 0; j < row_copies; j++) {
      int i = j * 32 + lane;
      if (TENSORS * TILE * ROW_COPIES % 32 == 0 || i < TENSORS * TILE * ROW_COPIES)
        copy<16>((char*)own.stage[to].rows + i * 16, row_from[j], i / ROW_COPIES % TILE < left ? 16 : 0);
      row_from[j] += row_step[j];
    }
#pragma unroll
    for (int j = 0; j < bc_copies; j++) {
      int i = j * 32 + lane;
      if (TILE * BC_COPIES % 32 == 0 || i < TILE * BC_COPIES)
        copy<BC_VECTOR>((char*)own.stage[to].BC + i * BC_VECTOR, bc_from[j], i / BC_COPIES % TILE < left ? BC_VECTOR : 0);
      bc_from[j] += bc_step;
    }
  };
  const int rows = (int)(end - begin);
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (i * TILE < rows) load(i, rows - i * TILE);
    copy_commit();
  }

  const int pair = (lane & 7) * 2, pair_row = lane >> 3;
  float bias0 = 0.f, bias1 = 0.f;
#if HAS_BIAS
  bias0 = p.bias[first + pair], bias1 = p.bias[first + pair + 1];
#endif

  float total = 0.f;
  bool cut = false;
  int stage = 0;
  for (int row = 0; row < rows && !cut; row += TILE) {
    u32 alive = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) alive |= (__any_sync(FULL, a[i] * total > FADED) ? 1u : 0u) << i;
    if (!alive) break;
    copy_wait<STAGES - 2>();
    __syncwarp();
    const int left = rows - row;
    if (left > (STAGES - 1) * TILE) load(stage == 0 ? STAGES - 1 : stage - 1, left - (STAGES - 1) * TILE);
    copy_commit();
    const Stage& st = own.stage[stage];
    stage = stage + 1 == STAGES ? 0 : stage + 1;

    int valid = TILE;  // rows of this tile that belong to the border's document
#if HAS_RESETS
    {
      i64 s = ADJOINT ? begin + row + lane : end - 1 - row - lane, at = REVERSE ? p.length - s : s;
      u32 starts = __ballot_sync(FULL, lane < TILE && lane < left && at < p.length && p.resets[batch * p.length + at]);
      if (starts) cut = true, valid = __ffs(starts) - 1 + !ADJOINT;  // a document's first step still counts going back to it
    }
#endif
    {  // all loads first: the compiler may not move them over the stores
      constexpr int passes = TILE / 4;
      Pair raw[TENSORS][passes], raw_BC[passes];
      float2 d[passes], v[passes];
#pragma unroll
      for (int k = 0; k < passes; k++) {
#pragma unroll
        for (int j = 0; j < TENSORS; j++) raw[j][k] = *(const Pair*)&st.rows[j][k * 4 + pair_row][pair];
        raw_BC[k] = ((const Pair*)st.BC)[k * 32 + lane];
      }
#pragma unroll
      for (int k = 0; k < passes; k++) {
        const int r = k * 4 + pair_row;
        d[k] = widen(raw[0][k]), v[k] = widen(raw[1][k]);
        d[k].x += bias0, d[k].y += bias1;
#if SOFTPLUS
        d[k].x = softplus(d[k].x), d[k].y = softplus(d[k].y);
#endif
        if (r >= left) d[k].x = d[k].y = 0.f;
#if ADJOINT && HAS_Z
        float2 gate = widen(raw[2][k]);
        v[k].x *= gate.x * sigmoid(gate.x), v[k].y *= gate.y * sigmoid(gate.y);
#elif !ADJOINT
        v[k].x *= d[k].x, v[k].y *= d[k].y;
#endif
        if (r >= valid) v[k].x = v[k].y = 0.f;
      }
#pragma unroll
      for (int k = 0; k < passes; k++) {
        *(float4*)&own.step[k * 4 + pair_row][pair] = make_float4(d[k].x, v[k].x, d[k].y, v[k].y);
        ((float2*)own.BC)[k * 32 + lane] = widen(raw_BC[k]);
      }
    }
    __syncwarp();

    float before[TILE], value[TILE];
#pragma unroll
    for (int r = 0; r < TILE; r++) {
      float2 q = own.step[r][local];
      if (ADJOINT) total += q.x;
      before[r] = total, value[r] = q.y;
      if (!ADJOINT) total += q.x;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (alive >> i & 1) {
        float even = 0.f, odd = 0.f;
#pragma unroll
        for (int r = 0; r < TILE; r += 2) {
          even = fmaf(ex2(a[i] * before[r]), value[r] * own.BC[r][part * 8 + i], even);
          odd = fmaf(ex2(a[i] * before[r + 1]), value[r + 1] * own.BC[r + 1][part * 8 + i], odd);
        }
        sum[i] += even + odd;
      }
    __syncwarp();
  }
  copy_wait<0>();
  float* to = p.sums + ((batch * p.chunks + number) * 16 + part * 8) * p.channels + c;
#pragma unroll
  for (int i = 0; i < 8; i++) to[(i64)i * p.channels] = sum[i];
  if (part == 0) p.totals[(batch * p.chunks + number) * p.channels + c] = cut ? -1.f : total;
}

// The state at every chunk's start (or the adjoint at its end), in place over the sums. One thread a (batch, state, channel).
struct Chain {
  const float *A, *edge, *totals;  // edge: (batch, channels, 16), the initial state or the final state's gradient, or null
  const u8* resets;
  float* sums;
  i64 length, count;  // count: batch * 16 * channels
  int channels, chunks;
};
extern "C" __global__ void __launch_bounds__(128) combine(const __grid_constant__ Chain p) {
  i64 i = (i64)blockIdx.x * 128 + threadIdx.x;
  if (i >= p.count) return;
  int c = (int)(i % p.channels), n = (int)(i / p.channels % 16);
  i64 batch = i / p.channels / 16;
  float a = p.A[(i64)c * 16 + n] * LOG2E;
  float state = p.edge ? p.edge[(batch * p.channels + c) * 16 + n] : 0.f;
#if HAS_RESETS && REVERSE && ADJOINT
  if (p.resets[batch * p.length]) state = 0.f;
#endif
  for (int j = 0; j < p.chunks; j++) {
    int k = ADJOINT ? p.chunks - 1 - j : j;
    float* at = p.sums + ((batch * p.chunks + k) * 16 + n) * p.channels + c;
    float left = *at;
    *at = state;
    if (j + 1 < p.chunks) {
      float total = p.totals[(batch * p.chunks + k) * p.channels + c];
      state = left + (total < 0.f ? 0.f : ex2(a * total) * state);
    }
  }
}
