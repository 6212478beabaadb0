// The causal depthwise convolution, forward. A thread walks STEPS steps of VECTOR neighbouring channels, ROWS at a time, the
// 16-byte loads of the next ROWS under way while these are worked on: bound by memory bandwidth.
// Time is counted in processing order s = 0 .. length-1; with REVERSE the position is length-1-s.
struct Parameters {
  const T* x;
  const float *weight, *bias;  // (WIDTH, channels), (channels,)
  const T* initial;            // (batch, WIDTH - 1, channels), oldest first, or null
  const u8* resets;            // (batch, length), or null
  T *y, *final_state;
  i64 x_batch, x_row, length;
  int channels;
};

#define VECTOR (16 / (int)sizeof(T))
#define PAST (WIDTH - 1)
struct __align__(16) Vector {  // as pairs: 16-bit elements stay packed in registers
  Pair v[VECTOR / 2];
};

__device__ __forceinline__ i64 position(i64 s, i64 length) { return REVERSE ? length - 1 - s : s; }

// Whether step s begins a document in processing order: in reverse, s sees the border that lies at position t + 1.
__device__ __forceinline__ bool begins(const Parameters& p, i64 batch, i64 s) {
#if HAS_RESETS
  i64 at = REVERSE ? p.length - s : s;
  return s >= 0 && at < p.length && p.resets[batch * p.length + at];
#else
  return false;
#endif
}

__device__ __forceinline__ Vector seen(const Parameters& p, i64 batch, i64 s, int c) {
  Vector zero;
#pragma unroll
  for (int i = 0; i < VECTOR / 2; i++) zero.v[i] = Pair();
  if (s >= p.length) return zero;
  if (s >= 0) return *(const Vector*)(p.x + batch * p.x_batch + position(s, p.length) * p.x_row + c);
  return p.initial ? *(const Vector*)(p.initial + (batch * PAST + PAST + s) * p.channels + c) : zero;
}

// The last WIDTH - 1 inputs, oldest first, those of documents that have ended as zeros: x holds steps s0 - PAST and on, of
// which those before s0 are another's to write unless this is the start.
__device__ __forceinline__ void keep_last(const Parameters& p, i64 batch, i64 s0, bool start, int c, const Vector* x) {
  const i64 from = p.length - PAST;
  if (s0 + ROWS <= from) return;
#pragma unroll
  for (int i = 0; i < ROWS + PAST; i++) {
    const i64 s = s0 - PAST + i;
    if (s >= from && s < p.length && (i >= PAST || start)) {
      Vector v = x[i];
#if HAS_RESETS
      bool ended = REVERSE && p.resets[batch * p.length];
      for (i64 later = s + 1; later < p.length; later++) ended |= begins(p, batch, later);
#pragma unroll
      for (int j = 0; j < VECTOR / 2; j++) v.v[j] = ended ? Pair() : v.v[j];
#endif
      *(Vector*)(p.final_state + (batch * PAST + (s - from)) * p.channels + c) = v;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) conv_forward(const __grid_constant__ Parameters p) {
  const int groups = p.channels / VECTOR;
  const i64 index = (i64)blockIdx.x * THREADS + threadIdx.x, batch = blockIdx.y;
  const i64 begin = index / groups * STEPS;
  if (begin >= p.length) return;
  const int c = (int)(index % groups) * VECTOR;

  float w[WIDTH][VECTOR], bias[VECTOR];
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    bias[i] = p.bias ? p.bias[c + i] : 0.f;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) w[k][i] = p.weight[(i64)(PAST - k) * p.channels + c + i];
  }
  T* y = p.y + (batch * p.length + position(begin, p.length)) * p.channels + c;
  const i64 step = REVERSE ? -(i64)p.channels : (i64)p.channels;
  Vector x[ROWS + PAST], next[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS + PAST; i++) x[i] = seen(p, batch, begin - PAST + i, c);

  for (i64 s0 = begin; s0 < begin + STEPS && s0 < p.length; s0 += ROWS) {
    const bool more = s0 + ROWS < begin + STEPS;
#pragma unroll
    for (int i = 0; i < ROWS; i++)
      if (more) next[i] = seen(p, batch, s0 + ROWS + i, c);
#if HAS_RESETS
    u32 borders = 0;  // bit i: step s0 - PAST + i begins a document
#pragma unroll
    for (int i = 0; i < ROWS + PAST; i++) borders |= (begins(p, batch, s0 - PAST + i) ? 1u : 0u) << i;
#endif
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      Vector out;
      bool keep[WIDTH];
      keep[0] = true;
#pragma unroll
      for (int k = 1; k < WIDTH; k++) {
        keep[k] = keep[k - 1];
#if HAS_RESETS
        if (borders >> (r + PAST - k + 1) & 1) keep[k] = false;
#endif
      }
#pragma unroll
      for (int i = 0; i < VECTOR / 2; i++) {
        float2 sum = make_float2(bias[2 * i], bias[2 * i + 1]);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
          const float2 v = widen(keep[k] ? x[r + PAST - k].v[i] : Pair());
          sum.x = fmaf(w[k][2 * i], v.x, sum.x), sum.y = fmaf(w[k][2 * i + 1], v.y, sum.y);
        }
#if SILU
        sum.x *= sigmoid(sum.x), sum.y *= sigmoid(sum.y);
#endif
        store_pair((T*)&out.v[i], sum.x, sum.y);
      }
      if (s0 + r < p.length) *(Vector*)y = out;
      y += step;
    }
    keep_last(p, batch, s0, begin == 0 && s0 == 0, c, x);
#pragma unroll
    for (int i = 0; i < PAST; i++) x[i] = x[ROWS + i];
#pragma unroll
    for (int i = 0; i < ROWS; i++) x[PAST + i] = next[i];
  }
}
