// Drawing a token: one warp a stream. The random number is Philox4x32-10 (Salmon et al., SC 2011) of (seed, position,
// stream), so a stream's tokens do not depend on what else is in the batch. VOCAB: ids, a multiple of 16.
struct Sampling {
  u64 seed;
  float inverse_temperature;  // 0 takes the likeliest
  float top_p;
  int top_k;  // VOCAB or more: all
};

// A number in [0, 1) with 24 random bits.
__device__ __forceinline__ float uniform(u64 seed, u64 position, u32 stream) {
  u32 c0 = (u32)position, c1 = (u32)(position >> 32), c2 = stream, c3 = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    u64 a = (u64)0xD2511F53u * c0, b = (u64)0xCD9E8D57u * c2;
    c0 = (u32)(b >> 32) ^ c1 ^ k0;
    c2 = (u32)(a >> 32) ^ c3 ^ k1;
    c1 = (u32)b;
    c3 = (u32)a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (float)(c0 >> 8) * 5.9604644775390625e-8f;
}

template <typename V, typename F> __device__ __forceinline__ V over_warp(V v, F combine) {
#pragma unroll
  for (int i = 16; i; i >>= 1) v = combine(v, __shfl_xor_sync(FULL, v, i));
  return v;
}
template <typename V> __device__ __forceinline__ V sum_over_warp(V v) {
  return over_warp(v, [](V a, V b) { return a + b; });
}
// The sum over the lanes below this one.
template <typename V> __device__ __forceinline__ V sum_below(V v, int lane) {
  V sum = v;
#pragma unroll
  for (int i = 1; i < 32; i <<= 1) {
    V other = __shfl_up_sync(FULL, sum, i);
    if (lane >= i) sum += other;
  }
  V below = __shfl_up_sync(FULL, sum, 1);
  return lane ? below : V(0);
}
// Floats as integers in the same order.
__device__ __forceinline__ u32 ordered(float v) {
  u32 bits = __float_as_uint(v);
  return bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
}

// The token that all lanes agree on. `logits` in shared memory; `bias` is 0, or -inf where a token may not be drawn.
// Ties: the lower id comes first, as in a stable sort.
__device__ __noinline__ int draw_token(const float* logits, const float* bias, const Sampling& how, u64 position, u32 stream) {
  constexpr int MINE = (VOCAB + 31) / 32;  // each lane holds that many neighbours, so that sums run in the order of ids
  const int lane = threadIdx.x & 31;
  const float drawn = uniform(how.seed, position, stream);
  float weight[MINE];
  u32 key[MINE];
  float best = -__int_as_float(0x7f800000);
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    int id = lane * MINE + i;
    weight[i] = id < VOCAB ? logits[id] + bias[id] : -__int_as_float(0x7f800000);
    best = fmaxf(best, weight[i]);
    key[i] = ordered(weight[i]);
  }
  best = over_warp(best, [](float a, float b) { return fmaxf(a, b); });

  if (how.inverse_temperature == 0.f) {
    int first = VOCAB - 1;
#pragma unroll
    for (int i = MINE - 1; i >= 0; i--)
      if (weight[i] == best) first = lane * MINE + i;
    return over_warp(first, [](int a, int b) { return min(a, b); });
  }

#pragma unroll
  for (int i = 0; i < MINE; i++) weight[i] = ex2((weight[i] - best) * how.inverse_temperature * LOG2E);
  if (how.top_k < VOCAB) {  // the largest threshold that leaves top_k ids, bit by bit
    u32 threshold = 0;
    for (u32 bit = 0x80000000u; bit; bit >>= 1) {
      int left = 0;
#pragma unroll
      for (int i = 0; i < MINE; i++) left += key[i] >= (threshold | bit);
      if (sum_over_warp(left) >= how.top_k) threshold |= bit;
    }
    int above = 0, equal = 0;
#pragma unroll
    for (int i = 0; i < MINE; i++) above += key[i] > threshold, equal += key[i] == threshold;
    int rank = sum_below(equal, lane), room = how.top_k - sum_over_warp(above);
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      if (key[i] < threshold || (key[i] == threshold && rank++ >= room)) weight[i] = 0.f, key[i] = 0;
    }
  }
  if (how.top_p < 1.f) {  // an id stays while those that are likelier have less than top_p together
    float all = 0.f;
#pragma unroll
    for (int i = 0; i < MINE; i++) all += weight[i];
    const float wanted = how.top_p * sum_over_warp(all);
    u32 threshold = 0;
    for (u32 bit = 0x80000000u; bit; bit >>= 1) {
      float left = 0.f;
#pragma unroll
      for (int i = 0; i < MINE; i++) left += key[i] >= (threshold | bit) ? weight[i] : 0.f;
      if (sum_over_warp(left) >= wanted) threshold |= bit;
    }
    float above = 0.f;
    int equal = 0;
#pragma unroll
    for (int i = 0; i < MINE; i++) above += key[i] > threshold ? weight[i] : 0.f, equal += key[i] == threshold;
    above = sum_over_warp(above);
    int rank = sum_below(equal, lane);
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      bool later = key[i] == threshold && above + (float)rank * weight[i] >= wanted && rank > 0;
      rank += key[i] == threshold;
      if (key[i] < threshold || later) weight[i] = 0.f;
    }
  }

  float mine = 0.f;
#pragma unroll
  for (int i = 0; i < MINE; i++) mine += weight[i];
  float passed = sum_below(mine, lane);
  const float target = drawn * __shfl_sync(FULL, passed + mine, 31);
  int found = VOCAB, last = 0;  // `last` where rounding leaves the target above every partial sum
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    passed += weight[i];
    if (weight[i] > 0.f) {
      last = lane * MINE + i;
      if (passed > target && found == VOCAB) found = last;
    }
  }
  found = over_warp(found, [](int a, int b) { return min(a, b); });
  last = over_warp(last, [](int a, int b) { return max(a, b); });
  return found < VOCAB ? found : last;
}
