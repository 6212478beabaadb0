// The forward scan, state size 16. A warp owns CHANNELS channels x 16 states and runs on its own: no block barrier.
// A lane keeps PER_LANE states of one channel in registers, LANES lanes share a channel. Rows of x, dt, z, B, C come by
// asynchronous copies, STAGES tiles of TILE steps deep; softplus, dt * x and the conversion of B and C to float32 are
// done once a tile into shared memory; the steps then cost per element one ex2 and four multiply-adds.
//
// Time is counted in processing order s = 0 .. length-1; with REVERSE the position is length-1-s.
struct Parameters {
  const T *x, *dt, *z, *B, *C;
  const float *A, *D, *bias, *initial, *starts;
  const u8* resets;
  T* y;
  float *final_state, *saved;
  i64 x_batch, x_row, dt_batch, dt_row, z_batch, z_row, B_batch, B_row, C_batch, C_row;
  i64 length;
  int channels, groups, chunk, chunks;
};

#define LANES (16 / PER_LANE)
#define CHANNELS (32 / LANES)
#define ROW_COPIES (CHANNELS * (int)sizeof(T) / 16)
#define BC_COPIES (16 * (int)sizeof(T) / BC_VECTOR)  // BC_VECTOR: the bytes to which rows of B and C are aligned
#define TENSORS (2 + HAS_Z)

struct __align__(16) Stage {
  T rows[TENSORS][TILE][CHANNELS];  // x, dt, z
  T BC[2][TILE][16];
};
struct __align__(16) Warp {
  Stage stage[STAGES];
  float2 step[TILE][CHANNELS];  // dt, dt * x
  float B[TILE][16], C[TILE][16];
};

__device__ __forceinline__ i64 position(i64 s, i64 length) { return REVERSE ? length - 1 - s : s; }

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_forward(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(16) u8 shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Warp& own = ((Warp*)shared)[warp];
  const int first = (blockIdx.x * WARPS + warp) * CHANNELS;
  if (first >= p.channels) return;
  const i64 batch = blockIdx.y;
  const i64 begin = (i64)blockIdx.z * p.chunk, end = min(begin + p.chunk, p.length);
  const int group = first / (p.channels / p.groups);
  const int part = lane % LANES, local = lane / LANES, c = first + local;

  float a[PER_LANE], h[PER_LANE];
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int n = part * PER_LANE + i;
    a[i] = p.A[(i64)c * 16 + n] * LOG2E;
    h[i] = p.starts ? p.starts[((batch * p.chunks + blockIdx.z) * 16 + n) * p.channels + c]
                    : (p.initial ? p.initial[(batch * p.channels + c) * 16 + n] : 0.f);
  }
#if HAS_D
  const float skip = p.D[c];
#endif

  // What this lane copies of every tile; the addresses move on by a tile at a time.
  constexpr int row_copies = (TENSORS * TILE * ROW_COPIES + 31) / 32, bc_copies = (2 * TILE * BC_COPIES + 31) / 32;
  const char *row_from[row_copies], *bc_from[bc_copies];
  i64 row_step[row_copies], bc_step[bc_copies];
  const i64 way = REVERSE ? -(i64)sizeof(T) : (i64)sizeof(T), start = position(begin, p.length);
#pragma unroll
  for (int j = 0; j < row_copies; j++) {
    int i = j * 32 + lane, k = i % ROW_COPIES * 16, r = i / ROW_COPIES % TILE, tensor = i / (ROW_COPIES * TILE);
    const T* base = tensor == 0 ? p.x + batch * p.x_batch : tensor == 1 ? p.dt + batch * p.dt_batch : p.z + batch * p.z_batch;
    i64 row = tensor == 0 ? p.x_row : tensor == 1 ? p.dt_row : p.z_row;
    row_from[j] = (const char*)(base + first + start * row) + k + r * row * way;
    row_step[j] = TILE * row * way;
  }
#pragma unroll
  for (int j = 0; j < bc_copies; j++) {
    int i = j * 32 + lane, k = i % BC_COPIES * BC_VECTOR, r = i / BC_COPIES % TILE, tensor = i / (BC_COPIES * TILE);
    i64 row = tensor ? p.C_row : p.B_row;
    const T* base = tensor ? p.C + batch * p.C_batch : p.B + batch * p.B_batch;
    bc_from[j] = (const char*)(base + group * 16 + start * row) + k + r * row * way;
    bc_step[j] = TILE * row * way;
  }
  auto load = [&](int to, int left) {  // left: steps from this tile's first to the end
    char* rows = (char*)own.stage[to].rows;
    char* BC = (char*)own.stage[to].BC;
#pragma unroll
    for (int j = 0; j < row_copies; j++) {
      int i = j * 32 + lane;
      if (TENSORS * TILE * ROW_COPIES % 32 == 0 || i < TENSORS * TILE * ROW_COPIES)
        copy<16>(rows + i * 16, row_from[j], i / ROW_COPIES % TILE < left ? 16 : 0);
      row_from[j] += row_step[j];
    }
#pragma unroll
    for (int j = 0; j < bc_copies; j++) {
      int i = j * 32 + lane;
      if (2 * TILE * BC_COPIES % 32 == 0 || i < 2 * TILE * BC_COPIES)
        copy<BC_VECTOR>(BC + i * BC_VECTOR, bc_from[j], i / BC_COPIES % TILE < left ? BC_VECTOR : 0);
      bc_from[j] += bc_step[j];
    }
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (begin + i * TILE < end) load(i, (int)min(end - begin - i * TILE, (i64)TILE));
    copy_commit();
  }

  const int pair = lane % (CHANNELS / 2) * 2, pair_row = lane / (CHANNELS / 2);
  float bias0 = 0.f, bias1 = 0.f;
#if HAS_BIAS
  bias0 = p.bias[first + pair], bias1 = p.bias[first + pair + 1];
#endif
  T* y = p.y + (batch * p.length + position(begin + part, p.length)) * p.channels + c;
  const i64 y_step = (REVERSE ? -(i64)p.channels : (i64)p.channels) * LANES;

#if SAVE_EVERY
  float* saved = p.saved + ((batch * ((p.length + SAVE_EVERY - 1) / SAVE_EVERY) + begin / SAVE_EVERY) * 16 + part * PER_LANE) * p.channels + c;
#endif

  int stage = 0;
  for (i64 s0 = begin; s0 < end; s0 += TILE) {
    const int left = (int)min(end - s0, (i64)(STAGES * TILE));
    copy_wait<STAGES - 2>();
    __syncwarp();
    if (left > (STAGES - 1) * TILE) load(stage == 0 ? STAGES - 1 : stage - 1, left - (STAGES - 1) * TILE);
    copy_commit();
    const Stage& st = own.stage[stage];
    stage = stage + 1 == STAGES ? 0 : stage + 1;

#if HAS_RESETS
    u32 cut;
    {
      i64 s = s0 + lane;
      i64 at = REVERSE ? p.length - s : s;  // in reverse, a document that begins at t + 1 ends what t receives
      cut = __ballot_sync(FULL, lane < TILE && s < end && at < p.length && p.resets[batch * p.length + at]);
    }
#endif
    {  // all loads first: the compiler may not move them over the stores
      constexpr int passes = TILE * CHANNELS / 64, bc_passes = TILE / 4;
      Pair raw_dt[passes], raw_x[passes], raw_B[bc_passes], raw_C[bc_passes];
      float2 d[passes];
#pragma unroll
      for (int k = 0; k < passes; k++) {
        raw_dt[k] = *(const Pair*)&st.rows[1][k * (64 / CHANNELS) + pair_row][pair];
        raw_x[k] = *(const Pair*)&st.rows[0][k * (64 / CHANNELS) + pair_row][pair];
      }
#pragma unroll
      for (int k = 0; k < bc_passes; k++) {
        raw_B[k] = ((const Pair*)st.BC[0])[k * 32 + lane];
        raw_C[k] = ((const Pair*)st.BC[1])[k * 32 + lane];
      }
#pragma unroll
      for (int k = 0; k < passes; k++) {
        d[k] = widen(raw_dt[k]);
        d[k].x += bias0, d[k].y += bias1;
#if SOFTPLUS
        d[k].x = softplus(d[k].x), d[k].y = softplus(d[k].y);
#endif
        if (k * (64 / CHANNELS) + pair_row >= left) d[k].x = d[k].y = 0.f;  // past the end nothing decays or enters
      }
#pragma unroll
      for (int k = 0; k < passes; k++) {
        float2 v = widen(raw_x[k]);
        *(float4*)&own.step[k * (64 / CHANNELS) + pair_row][pair] = make_float4(d[k].x, d[k].x * v.x, d[k].y, d[k].y * v.y);
      }
#pragma unroll
      for (int k = 0; k < bc_passes; k++) {
        ((float2*)own.B)[k * 32 + lane] = widen(raw_B[k]);
        ((float2*)own.C)[k * 32 + lane] = widen(raw_C[k]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int r0 = 0; r0 < TILE; r0 += LANES) {
#if SAVE_EVERY
      if (r0 % SAVE_EVERY == 0 && r0 < left) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) saved[(i64)i * p.channels] = h[i];
        saved += (i64)16 * p.channels;
      }
#endif
      float sum[4];
#pragma unroll
      for (int j = 0; j < LANES; j++) {
        const int r = r0 + j;
        float2 q = own.step[r][local];
        float b[PER_LANE], cc[PER_LANE];
#pragma unroll
        for (int i = 0; i < PER_LANE; i += 4) {
          *(float4*)&b[i] = *(const float4*)&own.B[r][part * PER_LANE + i];
          *(float4*)&cc[i] = *(const float4*)&own.C[r][part * PER_LANE + i];
        }
#if HAS_RESETS
        if (cut >> r & 1) {
#pragma unroll
          for (int i = 0; i < PER_LANE; i++) h[i] = 0.f;
        }
#endif
        float even = 0.f, odd = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i += 2) {
          h[i] = fmaf(ex2(q.x * a[i]), h[i], q.y * b[i]);
          h[i + 1] = fmaf(ex2(q.x * a[i + 1]), h[i + 1], q.y * b[i + 1]);
          even = fmaf(h[i], cc[i], even);
          odd = fmaf(h[i + 1], cc[i + 1], odd);
        }
        sum[j] = even + odd;
      }
      // The sums over the lanes of a channel, for LANES steps at once: each lane ends with the step of its own number.
      float out = sum[0];
      if (LANES == 2) out = (part ? sum[1] : sum[0]) + __shfl_xor_sync(FULL, part ? sum[0] : sum[1], 1);
      if (LANES == 4) {
        const bool high = part & 2, low = part & 1;
        float s0 = (high ? sum[2] : sum[0]) + __shfl_xor_sync(FULL, high ? sum[0] : sum[2], 2);
        float s1 = (high ? sum[3] : sum[1]) + __shfl_xor_sync(FULL, high ? sum[1] : sum[3], 2);
        out = (low ? s1 : s0) + __shfl_xor_sync(FULL, low ? s0 : s1, 1);
      }
      const int r = r0 + part;
#if HAS_D
      out = fmaf(skip, to_float(st.rows[0][r][local]), out);
#endif
#if HAS_Z
      float gate = to_float(st.rows[2][r][local]);
      out *= gate * sigmoid(gate);
#endif
      if (r < left) *y = from_float(out);
      y += y_step;
    }
  }
  if (end == p.length) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
#if HAS_RESETS && REVERSE
      if (p.resets[batch * p.length]) h[i] = 0.f;
#endif
      p.final_state[(batch * p.channels + c) * 16 + part * PER_LANE + i] = h[i];
    }
  }
}
