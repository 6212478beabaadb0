// The causal depthwise convolution, forward. A thread makes ROWS outputs of VECTOR neighbouring channels from ROWS + WIDTH - 1
// inputs, all of whose 16-byte loads are under way at once: bound by memory bandwidth.
// Time is counted in processing order s = 0 .. length-1; with REVERSE the position is length-1-s.
struct Parameters {
  const T* x;
  const float *weight, *bias;  // (channels, WIDTH), (channels,)
  const T* initial;            // (batch, WIDTH - 1, channels), oldest first, or null
  const u8* resets;            // (batch, length), or null
  T *y, *final_state;
  i64 x_batch, x_row, length;
  int channels;
};

#define VECTOR (16 / (int)sizeof(T))
#define PAST (WIDTH - 1)
struct __align__(16) Vector {
  T v[VECTOR];
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
  for (int i = 0; i < VECTOR; i++) zero.v[i] = T();
  if (s >= p.length) return zero;
  if (s >= 0) return *(const Vector*)(p.x + batch * p.x_batch + position(s, p.length) * p.x_row + c);
  return p.initial ? *(const Vector*)(p.initial + (batch * PAST + PAST + s) * p.channels + c) : zero;
}

extern "C" __global__ void __launch_bounds__(THREADS) conv_forward(const __grid_constant__ Parameters p) {
  const int groups = p.channels / VECTOR;
  const i64 index = (i64)blockIdx.x * THREADS + threadIdx.x, batch = blockIdx.y;
  const i64 s0 = index / groups * ROWS;
  if (s0 >= p.length) return;
  const int c = (int)(index % groups) * VECTOR;

  Vector x[ROWS + PAST];
#pragma unroll
  for (int i = 0; i < ROWS + PAST; i++) x[i] = seen(p, batch, s0 - PAST + i, c);

  float w[WIDTH][VECTOR], bias[VECTOR];
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    bias[i] = p.bias ? p.bias[c + i] : 0.f;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) w[k][i] = p.weight[(i64)(c + i) * WIDTH + PAST - k];
  }
  T* y = p.y + (batch * p.length + position(s0, p.length)) * p.channels + c;
  const i64 step = REVERSE ? -(i64)p.channels : (i64)p.channels;
#if HAS_RESETS
  u32 borders = 0;  // bit i: step s0 - PAST + i begins a document
#pragma unroll
  for (int i = 0; i < ROWS + PAST; i++) borders |= (begins(p, batch, s0 - PAST + i) ? 1u : 0u) << i;
#endif
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (s0 + r < p.length) {
      Vector out;
      float keep[WIDTH];
      keep[0] = 1.f;
#pragma unroll
      for (int k = 1; k < WIDTH; k++) {
        keep[k] = keep[k - 1];
#if HAS_RESETS
        if (borders >> (r + PAST - k + 1) & 1) keep[k] = 0.f;
#endif
      }
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        float sum = bias[i];
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
          float v = to_float(x[r + PAST - k].v[i]);
#if HAS_RESETS
          v = keep[k] != 0.f ? v : 0.f;
#endif
          sum = fmaf(w[k][i], v, sum);
        }
#if SILU
        sum *= sigmoid(sum);
#endif
        out.v[i] = from_float(sum);
      }
      *(Vector*)y = out;
    }
    y += step;
  }

  // The last WIDTH - 1 inputs, oldest first; those of documents that have ended as zeros.
  const i64 from = p.length - PAST;
#pragma unroll
  for (int i = 0; i < ROWS + PAST; i++) {
    i64 s = s0 - PAST + i;
    if (s >= from && s < p.length && (i >= PAST || s0 == 0)) {
      Vector v = x[i];
      bool ended = false;
      for (i64 later = s + 1; later < p.length; later++) ended |= begins(p, batch, later);
#if HAS_RESETS && REVERSE
      ended |= p.resets[batch * p.length] != 0;
#endif
      if (ended) {
#pragma unroll
        for (int j = 0; j < VECTOR; j++) v.v[j] = T();
      }
      *(Vector*)(p.final_state + (batch * PAST + (s - from)) * p.channels + c) = v;
    }
  }
}
