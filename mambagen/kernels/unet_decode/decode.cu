// A whole audio U-Net stepped in one launch: all levels, many samples, sampling inside (README.md says how it is laid out).
//
// A block serves STREAMS streams and runs everything: no block waits for another. The matrices of a level lie one after
// another in the order of their use, and a warp of its own, the feeder, copies them into a ring of slots in shared memory,
// as far ahead as the ring allows and across samples and levels, so that the second-level cache is read without a pause.
// Every product ends in a barrier of the other warps, after which its slots are given back to the feeder; long ones have
// such barriers inside. Everything is inlined: a call would keep the ring's place in local memory, and take
// from the compiler what it knows of shared memory.
//
// A matrix of OUT outputs and K inputs lies as (K / 8, OUT, 8) bfloat16; lane o of a warp takes the eight inputs of one
// output at a time. A word holds two weights: its lower half, and the whole word, whose last bits are the lower half's
// (the packing rounds with that in mind). Where there are fewer than 16 groups of 32 outputs, warps share the inputs and
// leave partial sums. Activations, sums and states are float32.
//
// Macros: LEVELS; WIDTHS, RANKS, LAYERS_OF, DOWNS, POOLS (lists, one number a level; ranks in multiples of 4), VOCAB,
// STREAMS, SLOTS, SLOT_BYTES, FIXED_BYTES (of Shared), WATCHDOG (see cluster.cuh).
constexpr int WARPS = 16, THREADS = 32 * WARPS;  // that compute; the feeder comes after them
constexpr int REFILL = SLOTS / 2;                // copies of a product after which the feeder gets their slots
static_assert(REFILL <= THREADS, "a thread gives a slot back");
constexpr int WIDTH_OF[] = {WIDTHS}, RANK_OF[] = {RANKS}, LAYER_COUNT[] = {LAYERS_OF}, DOWN_OF[] = {DOWNS};
constexpr int POOL_OF[] = {POOLS};  // 1 at the centre

__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int parts(int a, int b) { return (a + b - 1) / b; }

// How a product is spread over the warps.
template <int OUT, int K> struct Shape {
  static constexpr int GROUPS = parts(OUT, 32), ROWS = 32 * GROUPS;
  static constexpr int SHARES = GROUPS >= WARPS ? 1 : WARPS / GROUPS;  // of the inputs
  static constexpr int EACH = parts(GROUPS, WARPS);                    // groups of a warp
  static constexpr int STEPS = K / 8, CHUNK = least(STEPS, SLOT_BYTES / (ROWS * 16));
  static constexpr bool EVEN = STEPS % CHUNK == 0 && CHUNK % SHARES == 0;                        // every warp has the same steps
  static constexpr bool ALL = GROUPS * SHARES == WARPS || (SHARES == 1 && GROUPS % WARPS == 0);  // every warp has some
  static_assert(K % 8 == 0 && CHUNK > 0, "inputs come in eights, and a slot holds a step");
};

constexpr int widest() {
  int most_of = 0;
  for (int i = 0; i < LEVELS; i++) most_of = most(most_of, WIDTH_OF[i]);
  return most_of;
}
constexpr int largest_pool() {
  int found = 1;
  for (int i = 0; i < LEVELS; i++) found = most(found, POOL_OF[i] * WIDTH_OF[i]);
  return found;
}
constexpr int most_skips() {
  int found = 1;
  for (int i = 0; i < LEVELS; i++) found = most(found, most(DOWN_OF[i], 1) * WIDTH_OF[i]);
  return found;
}
constexpr int frame_floats() {  // of all buffers
  int sum = 0;
  for (int i = 0; i + 1 < LEVELS; i++) sum += POOL_OF[i] * WIDTH_OF[i];
  return sum;
}
constexpr int frame_offset(int level) {
  int sum = 0;
  for (int i = 0; i < level; i++) sum += POOL_OF[i] * WIDTH_OF[i];
  return sum;
}
// A condition is one row a stream: what is added where each level begins, then what on each way up.
__host__ __device__ constexpr int width_offset(int level) {
  int sum = 0;
  for (int i = 0; i < level; i++) sum += WIDTH_OF[i];
  return sum;
}
constexpr int RISING = width_offset(LEVELS - 1), CONDITION = width_offset(LEVELS) + RISING;
constexpr int D = widest(), E = 2 * D, MIXED = 32 + 64;
// Partial sums of any product: 512 where warps share the inputs, else all outputs.
constexpr int PARTS = most(most(2 * E, THREADS), most(largest_pool(), VOCAB));

// A layer's small parameters, in floats from its start: per channel the four taps; bias of the convolution, bias of dt,
// skip, 0; A log2(e); dt_proj.
__host__ __device__ constexpr int table_floats(int level) { return 2 * WIDTH_OF[level] * (4 + 4 + 16 + RANK_OF[level]); }

struct Parameters {
  const u8* weights;         // matrices of level 0, level 1, ...
  const float* tables;       // layers of level 0, level 1, ...
  const float* pool_bias;    // levels from 1: of the DownPool into it, of the UpPool back
  const float* embedding;    // (VOCAB, WIDTH_OF[0])
  const float* condition;    // (streams, CONDITION)
  const float* head_bias;    // (VOCAB,)
  const float* bias;         // (VOCAB,): 0, or -inf for what pads the vocabulary
  float* ssm;                // layers one after another: (streams, E, 16)
  float4* conv;              // (streams, E): the last three inputs, oldest first
  float* frames;             // (streams, 2, frame_floats()): buffers, queues
  float* logits;             // (streams, VOCAB): of the next sample, before and after
  const u64* seeds;          // (streams,)
  const int* forced;         // (steps, streams) or null: samples to read instead of drawing them
  int* tokens;               // (steps, streams) or null: the samples drawn
  float* all_logits;         // (steps, streams, VOCAB) or null: after each sample
  u64 position;              // samples that the streams have read
  Sampling sampling;         // its seed is not used
  int steps, streams;        // streams: of all blocks, a multiple of STREAMS
  int paired;                // 1: streams 2i and 2i + 1 are drawn together
  float guidance, epsilon;
};

struct __align__(128) Shared {
  float residual[STREAMS][D], skips[STREAMS][most_skips()];
  float convolved[STREAMS][E], gate[STREAMS][E], y[STREAMS][E];
  float part[STREAMS][PARTS];
  float mixed[STREAMS][MIXED];
  float buffer[STREAMS][most(frame_floats(), 1)], queue[STREAMS][most(frame_floats(), 1)];
  float rising[STREAMS][most(RISING, 1)];  // of the condition, what every sample needs in the middle of a level
  float logits[STREAMS][VOCAB];
  int token[STREAMS];
  u64 full[SLOTS], empty[SLOTS];
};
static_assert(sizeof(Shared) <= FIXED_BYTES && FIXED_BYTES % 128 == 0, "the ring comes after the fixed part");

// How many levels run at a step.
__device__ __forceinline__ int depth_at(u64 position) {
  int depth = 1;
#pragma unroll
  for (int i = 0; i + 1 < LEVELS; i++) {
    if (position % POOL_OF[i] != POOL_OF[i] - 1) break;
    position /= POOL_OF[i];
    depth++;
  }
  return depth;
}

// The feeder's place in the matrices and in the ring; the same order of products as below, with the same chunks.
struct Feeder {
  Shared& shared;
  u8* ring;
  const u8* from;
  u64 policy;
  int slot;
  u32 parity;  // of the end of the slot's last use

  template <int OUT, int K> __device__ __forceinline__ void feed() {
    typedef Shape<OUT, K> S;
    for (int k = 0; k < S::STEPS; k += S::CHUNK) {
      const u32 bytes = least(S::CHUNK, S::STEPS - k) * S::ROWS * 16;
      wait_for(&shared.empty[slot], parity);
      barrier_expect(&shared.full[slot], bytes);
      bulk_copy(ring + slot * SLOT_BYTES, from, bytes, &shared.full[slot], policy);
      from += bytes;
      if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
  }
  template <int LEVEL> __device__ __forceinline__ void feed_levels(int depth) {
    constexpr int W = WIDTH_OF[LEVEL], C = 2 * W, POOLED = LEVEL ? POOL_OF[most(LEVEL - 1, 0)] * WIDTH_OF[most(LEVEL - 1, 0)] : 8;
    if constexpr (LEVEL > 0) feed<W, POOLED>();
    for (int n = 0; n < LAYER_COUNT[LEVEL]; n++) feed<2 * C, W>(), feed<RANK_OF[LEVEL] + 32, C>(), feed<W, C>();
    if constexpr (LEVEL > 0) feed<POOLED, W>();
    else feed<VOCAB, W>();
    if constexpr (LEVEL + 1 < LEVELS)
      if (depth > 1) feed_levels<LEVEL + 1>(depth - 1);  // levels lie one after another
  }
};

// The copies as every other thread sees them.
struct Ring {
  Shared& shared;
  u8* memory;
  const Parameters& p;
  int slot, held;  // held: slots taken since the last barrier
  u32 parity;

  __device__ __forceinline__ const u8* take() {
    wait_for(&shared.full[slot], parity);
    return memory + slot * SLOT_BYTES;
  }
  __device__ __forceinline__ void next() {
    held++;
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
  // After a product: all threads that compute have read what was taken.
  __device__ __forceinline__ void sync() {
    team_sync(THREADS);
    const int i = fresh_thread();
    if (i < held) barrier_arrive(&shared.empty[slot - 1 - i + (slot - 1 - i < 0 ? SLOTS : 0)]);
    held = 0;
  }
};

__device__ __forceinline__ float lower(u32 word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float upper(u32 word) { return __uint_as_float(word); }
__device__ __forceinline__ float dot(float4 a, float4 b) { return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x))); }
__device__ __forceinline__ float over_quad(float v) {
  v += __shfl_xor_sync(FULL, v, 1);
  return v + __shfl_xor_sync(FULL, v, 2);
}

// Partial sums of a matrix times x[stream][K] in shared.part; ends before the block's barrier.
template <int OUT, int K, int ROW> __device__ __forceinline__ void product(Ring& ring, const float (*x)[ROW]) {
  typedef Shape<OUT, K> S;
  const int thread = fresh_thread(), warp = thread >> 5, lane = thread & 31;
  const int share = S::SHARES == 1 ? 0 : warp / S::GROUPS, group = S::SHARES == 1 ? warp : warp % S::GROUPS;
  float sum[S::EACH][STREAMS][2] = {};
  for (int k = 0; k < S::STEPS; k += S::CHUNK) {
    const u8* const chunk = ring.take();
    const auto step = [&](int j) {
      float4 a[STREAMS], b[STREAMS];
#pragma unroll
      for (int s = 0; s < STREAMS; s++)
        a[s] = *(const float4*)(x[s] + 8 * (k + j)), b[s] = *(const float4*)(x[s] + 8 * (k + j) + 4);
#pragma unroll
      for (int e = 0; e < S::EACH; e++) {
        if (S::GROUPS % WARPS && group + e * WARPS >= S::GROUPS) continue;
        const uint4 w = *(const uint4*)(chunk + ((j * S::GROUPS + group + e * WARPS) * 32 + lane) * 16);
#pragma unroll
        for (int s = 0; s < STREAMS; s++) {
          float (&to)[2] = sum[e][s];
          to[0] = fmaf(lower(w.x), a[s].x, to[0]), to[1] = fmaf(upper(w.x), a[s].y, to[1]);
          to[0] = fmaf(lower(w.y), a[s].z, to[0]), to[1] = fmaf(upper(w.y), a[s].w, to[1]);
          to[0] = fmaf(lower(w.z), b[s].x, to[0]), to[1] = fmaf(upper(w.z), b[s].y, to[1]);
          to[0] = fmaf(lower(w.w), b[s].z, to[0]), to[1] = fmaf(upper(w.w), b[s].w, to[1]);
        }
      }
    };
    if constexpr (S::EVEN) {
      if (S::ALL || share < S::SHARES)
#pragma unroll
        for (int i = 0; i < S::CHUNK / S::SHARES; i++) step(share + i * S::SHARES);
    } else if (share < S::SHARES) {
      for (int j = share; j < least(S::CHUNK, S::STEPS - k); j += S::SHARES) step(j);
    }
    ring.next();
    // a long product must give slots back while it runs
    if (parts(S::STEPS, S::CHUNK) > REFILL && k / S::CHUNK % REFILL == REFILL - 1) ring.sync();
  }
  if (S::ALL || share < S::SHARES)
#pragma unroll
    for (int e = 0; e < S::EACH; e++) {
      if (S::GROUPS % WARPS && group + e * WARPS >= S::GROUPS) continue;
#pragma unroll
      for (int s = 0; s < STREAMS; s++)
        ring.shared.part[s][share * S::ROWS + (group + e * WARPS) * 32 + lane] = sum[e][s][0] + sum[e][s][1];
    }
}

// An output of the product that was computed last.
template <int OUT, int K> __device__ __forceinline__ float output(const Shared& shared, int stream, int row) {
  typedef Shape<OUT, K> S;
  float sum = shared.part[stream][row];
#pragma unroll
  for (int i = 1; i < S::SHARES; i++) sum += shared.part[stream][i * S::ROWS + row];
  return sum;
}

// Calls `what` for the numbers below N, spread over the threads that compute.
template <int N, typename F> __device__ __forceinline__ void for_all(F what) {
  const int thread = fresh_thread();
  if constexpr (N <= THREADS) {
    if (thread < N) what(thread);
  } else {
    for (int i = thread; i < N; i += THREADS) what(i);
  }
}

// 1 / sqrt(mean square + epsilon) of a stream's residual, in all lanes of every warp.
template <int WIDTH> __device__ __forceinline__ float inverse_norm(const Shared& shared, const Parameters& p, int stream) {
  float sum = 0.f;
  for (int i = fresh_thread() & 31; i < WIDTH; i += 32) sum = fmaf(shared.residual[stream][i], shared.residual[stream][i], sum);
  return rsqrt_of(fmaf(sum_over_warp(sum), 1.f / WIDTH, p.epsilon));
}

// A layer's small parameters and states, in registers: they come from far, and are asked for a layer ahead where there is room.
template <int LEVEL> struct Held {
  static constexpr int C = 2 * WIDTH_OF[LEVEL], R = RANK_OF[LEVEL];
  static constexpr int PASSES = parts(4 * C, THREADS), CHANNELS = parts(C, THREADS);
  static constexpr bool AHEAD = PASSES * (1 + STREAMS) <= 6;
  float4 tap[CHANNELS], extra[CHANNELS], window[STREAMS][CHANNELS];  // of channel i THREADS + thread
  float4 a[PASSES], h[STREAMS][PASSES];                              // of four states of channel (i THREADS + thread) / 4
  float w[PASSES][R / 4], dt_bias[PASSES], skip[PASSES];

  __device__ __forceinline__ void take_taps(const float* table, const float4* conv) {
    const float4* const taps = (const float4*)table;
    const int thread = fresh_thread();
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
      const int c = i * THREADS + thread;
      if (c >= C) continue;
      tap[i] = taps[c], extra[i] = taps[C + c];
#pragma unroll
      for (int s = 0; s < STREAMS; s++) window[s][i] = conv[s * C + c];
    }
  }
  __device__ __forceinline__ void take_states(const float* table, const float* ssm) {
    const float4 *const more = (const float4*)table + C, *const A = more + C;
    const float* const dt_proj = (const float*)(A + 4 * C);
    const int thread = fresh_thread();
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
      const int unit = i * THREADS + thread, c = unit / 4, q = unit % 4;
      if (c >= C) continue;
      a[i] = A[unit], dt_bias[i] = more[c].y, skip[i] = more[c].z;
#pragma unroll
      for (int r = 0; r < R / 4; r++) w[i][r] = dt_proj[c * R + q * (R / 4) + r];
#pragma unroll
      for (int s = 0; s < STREAMS; s++) h[s][i] = ((const float4*)ssm)[s * 4 * C + unit];
    }
  }
};

// What a row of the residual is before layer n: it may be kept as a skip, and before the first layer on the way up the frame
// goes to the DownPool, and the UpPool's and the condition's are added.
template <int LEVEL> __device__ __forceinline__ float before_layer(Shared& shared, int n, int slot, int s, int row, float v) {
  constexpr int W = WIDTH_OF[LEVEL], DOWN = DOWN_OF[LEVEL];
  if (n < DOWN) shared.skips[s][n * W + row] = v;
  if (n == DOWN && POOL_OF[LEVEL] > 1) {
    const int at = frame_offset(LEVEL) + slot * W + row;
    shared.buffer[s][at] = v;
    v += shared.queue[s][at] + shared.rising[s][width_offset(LEVEL) + row];
  }
  if (n == DOWN && DOWN == 0) shared.skips[s][row] = v;
  return v;
}

// Layer n: residual += mixer(norm(residual)) (+ its skip), for all streams; `slot` is the frame's in the pool, `ssm` and `conv` are the layer's, of the block's
// first stream. What the next layer needs is asked for as soon as `held` is free.
template <int LEVEL>
__device__ __forceinline__ void layer(Ring& ring, Held<LEVEL>& held, const float* table, float* ssm, float4* conv, int n, int slot) {
  typedef Held<LEVEL> H;
  constexpr int LAYERS = LAYER_COUNT[LEVEL], DOWN = DOWN_OF[LEVEL];
  constexpr int W = WIDTH_OF[LEVEL], C = H::C, R = H::R, M = R + 32, PASSES = H::PASSES, CHANNELS = H::CHANNELS;
  Shared& shared = ring.shared;
  const Parameters& p = ring.p;
  const int thread = fresh_thread(), q = thread & 3;
  const bool adds = DOWN > 0 ? n >= DOWN : n == LAYERS - 1, last = n == LAYERS - 1;
  const int which = DOWN > 0 ? LAYERS - 1 - n : 0;

  if (!H::AHEAD) held.take_taps(table, conv);
  product<2 * C, W>(ring, shared.residual);  // the norm's weight is in the matrix, its scale comes after
  ring.sync();
  if (!H::AHEAD) held.take_states(table, ssm);
#pragma unroll
  for (int s = 0; s < STREAMS; s++) {
    if (thread >= C) continue;  // whole warps
    const float scale = inverse_norm<W>(shared, p, s);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
      const int c = i * THREADS + thread;
      if (c >= C) continue;
      const float x = scale * output<2 * C, W>(shared, s, c), z = scale * output<2 * C, W>(shared, s, C + c);
      const float4 old = held.window[s][i], tap = held.tap[i];
      const float sum = fmaf(tap.w, x, fmaf(tap.z, old.z, fmaf(tap.y, old.y, fmaf(tap.x, old.x, held.extra[i].x))));
      conv[s * C + c] = make_float4(old.y, old.z, x, 0.f);
      shared.convolved[s][c] = sum * sigmoid(sum);
      shared.gate[s][c] = z * sigmoid(z);
    }
  }
  team_sync(THREADS);
  product<M, C>(ring, shared.convolved);
  ring.sync();
  for_all<STREAMS * M>([&](int i) { shared.mixed[i / M][i % M] = output<M, C>(shared, i / M, i % M); });
  team_sync(THREADS);
#pragma unroll
  for (int s = 0; s < STREAMS; s++) {
    const float4 B = *(const float4*)(shared.mixed[s] + R + 4 * q), Cs = *(const float4*)(shared.mixed[s] + R + 16 + 4 * q);
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
      const int unit = i * THREADS + thread, c = unit / 4;
      const bool mine = c < C;  // all lanes take part in the sums
      float dt = 0.f;
#pragma unroll
      for (int r = 0; r < R / 4; r++) dt = mine ? fmaf(held.w[i][r], shared.mixed[s][q * (R / 4) + r], dt) : 0.f;
      dt = softplus(over_quad(dt) + (mine ? held.dt_bias[i] : 0.f));
      const float x = mine ? shared.convolved[s][c] : 0.f, u = dt * x;
      float4 state = mine ? held.h[s][i] : make_float4(0.f, 0.f, 0.f, 0.f);
      const float4 rate = mine ? held.a[i] : make_float4(0.f, 0.f, 0.f, 0.f);
      state.x = fmaf(ex2(dt * rate.x), state.x, u * B.x);
      state.y = fmaf(ex2(dt * rate.y), state.y, u * B.y);
      state.z = fmaf(ex2(dt * rate.z), state.z, u * B.z);
      state.w = fmaf(ex2(dt * rate.w), state.w, u * B.w);
      const float read = over_quad(dot(state, Cs));
      if (mine) {
        ((float4*)ssm)[s * 4 * C + unit] = state;
        if (q == 0) shared.y[s][c] = fmaf(held.skip[i], x, read) * shared.gate[s][c];
      }
    }
  }
  if (H::AHEAD && !last) {
    const float* const after = table + table_floats(LEVEL);
    held.take_taps(after, conv + (i64)p.streams * C);
    held.take_states(after, ssm + (i64)p.streams * C * 16);
  }
  team_sync(THREADS);
  product<W, C>(ring, shared.y);
  ring.sync();
  for_all<STREAMS * W>([&](int i) {
    const int s = i / W, row = i % W;
    const float v = shared.residual[s][row] + output<W, C>(shared, s, row);
    const float whole = adds ? v + shared.skips[s][which * W + row] : v;
    shared.residual[s][row] = before_layer<LEVEL>(shared, n + 1, slot, s, row, whole);
  });
  team_sync(THREADS);
}

// One frame of a level and what it gives to the one above (level 0: the logits).
template <int LEVEL>
__device__ __forceinline__ void run_level(Ring& ring, int slot, int first, const float* table, const float* pool_bias, float* ssm,
                                          float4* conv) {
  constexpr int W = WIDTH_OF[LEVEL], C = 2 * W, LAYERS = LAYER_COUNT[LEVEL], DOWN = DOWN_OF[LEVEL], POOL = POOL_OF[LEVEL];
  Shared& shared = ring.shared;
  const Parameters& p = ring.p;
  const int thread = fresh_thread();
  ssm += (i64)first * C * 16, conv += (i64)first * C;
  if constexpr (LEVEL > 0) {
    constexpr int K = POOL_OF[LEVEL - 1] * WIDTH_OF[LEVEL - 1];
    product<W, K>(ring, (const float(*)[most(frame_floats(), 1)])(&shared.buffer[0][frame_offset(LEVEL - 1)]));
    ring.sync();
    for_all<STREAMS * W>([&](int i) {
      const int s = i / W, row = i % W;
      const float more = pool_bias[row] + p.condition[(i64)(first + s) * CONDITION + width_offset(LEVEL) + row];
      shared.residual[s][row] = before_layer<LEVEL>(shared, 0, slot, s, row, output<W, K>(shared, s, row) + more);
    });
    team_sync(THREADS);
  }
  Held<LEVEL> held;
  if (Held<LEVEL>::AHEAD) held.take_taps(table, conv), held.take_states(table, ssm);
#pragma unroll 1
  for (int n = 0; n < LAYERS; n++) {
    layer<LEVEL>(ring, held, table, ssm, conv, n, slot);
    table += table_floats(LEVEL), ssm += (i64)p.streams * C * 16, conv += (i64)p.streams * C;
  }
  if constexpr (LEVEL > 0) {
    constexpr int OUT = POOL_OF[LEVEL - 1] * WIDTH_OF[LEVEL - 1];
    product<OUT, W>(ring, shared.residual);
    ring.sync();
    for_all<STREAMS * OUT>([&](int i) {
      shared.queue[i / OUT][frame_offset(LEVEL - 1) + i % OUT] = output<OUT, W>(shared, i / OUT, i % OUT) + pool_bias[W + i % OUT];
    });
    team_sync(THREADS);
  } else {
    product<VOCAB, W>(ring, shared.residual);
    ring.sync();
#pragma unroll
    for (int s = 0; s < STREAMS; s++) {
      const float scale = inverse_norm<W>(shared, p, s);
      for_all<VOCAB>([&](int i) { shared.logits[s][i] = fmaf(scale, output<VOCAB, W>(shared, s, i), p.head_bias[i]); });
    }
    team_sync(THREADS);
  }
}

// Level LEVEL and, where its frame is the last of a pooled one, those below it.
template <int LEVEL>
__device__ __forceinline__ void run_levels(Ring& ring, u64 place, int depth, int first, const float* table, const float* pool_bias,
                                           float* ssm, float4* conv) {
  run_level<LEVEL>(ring, (int)(place % POOL_OF[LEVEL]), first, table, pool_bias, ssm, conv);
  if constexpr (LEVEL + 1 < LEVELS)
    if (depth > 1) {
      constexpr int C = 2 * WIDTH_OF[LEVEL], N = LAYER_COUNT[LEVEL];
      const int biases = LEVEL > 0 ? WIDTH_OF[LEVEL] + POOL_OF[most(LEVEL - 1, 0)] * WIDTH_OF[most(LEVEL - 1, 0)] : 0;
      run_levels<LEVEL + 1>(ring, place / POOL_OF[LEVEL], depth - 1, first, table + N * table_floats(LEVEL), pool_bias + biases,
                            ssm + (i64)N * ring.p.streams * C * 16, conv + (i64)N * ring.p.streams * C);
    }
}

// The next sample of each stream, and its embedding as the residual.
__device__ __forceinline__ void choose(Ring& ring, int step, int slot, int first) {
  constexpr int W = WIDTH_OF[0];
  Shared& shared = ring.shared;
  const Parameters& p = ring.p;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  if (p.forced) {
    if (thread < STREAMS) shared.token[thread] = p.forced[(i64)step * p.streams + first + thread];
  } else {
    if (p.paired) {
      for (int i = thread; i < STREAMS / 2 * VOCAB; i += THREADS) {
        const int s = i / VOCAB * 2, id = i % VOCAB;
        const float asked = shared.logits[s][id], without = shared.logits[s | 1][id];
        shared.logits[s][id] = fmaf(p.guidance, asked - without, without);
      }
      team_sync(THREADS);
    }
    if (warp < STREAMS && (!p.paired || warp % 2 == 0)) {
      Sampling how = p.sampling;
      how.seed = p.seeds[first + warp];
      const int token = draw_token(shared.logits[warp], p.bias, how, p.position + step, 0);
      if (lane == 0) {
        shared.token[warp] = token;
        if (p.paired) shared.token[least(warp + 1, STREAMS - 1)] = token;
      }
    }
  }
  team_sync(THREADS);
  if (thread < STREAMS && p.tokens) p.tokens[(i64)step * p.streams + first + thread] = shared.token[thread];
  for_all<STREAMS * W>([&](int i) {
    const int s = i / W, row = i % W;
    const float v = p.embedding[(i64)shared.token[s] * W + row] + p.condition[(i64)(first + s) * CONDITION + row];
    shared.residual[s][row] = before_layer<0>(shared, 0, slot, s, row, v);
  });
  team_sync(THREADS);
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode(const __grid_constant__ Parameters p) {
  constexpr int FRAMES = frame_floats();
  u8* const memory = dynamic_shared();
  Shared& shared = *(Shared*)memory;
  const int thread = threadIdx.x, first = blockIdx.x * STREAMS;
  if (thread == 0) {
    for (int i = 0; i < SLOTS; i++) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], 1);
    barrier_init_done();
  }
  __syncthreads();
  if (thread >= THREADS) {
    if (thread > THREADS) return;
    Feeder feeder{shared, memory + FIXED_BYTES, p.weights, keep_policy(), 0, 1};  // an unused slot's phase before the first is over
    for (int step = 0; step < p.steps; step++) {
      feeder.from = p.weights;
      feeder.feed_levels<0>(depth_at(p.position + step));
    }
    return;
  }
  for (int i = thread; i < STREAMS * FRAMES; i += THREADS) {
    const float* const from = p.frames + (i64)(first + i / FRAMES) * 2 * FRAMES + i % FRAMES;
    shared.buffer[i / FRAMES][i % FRAMES] = from[0], shared.queue[i / FRAMES][i % FRAMES] = from[FRAMES];
  }
  for (int i = thread; i < STREAMS * RISING; i += THREADS)
    shared.rising[i / RISING][i % RISING] = p.condition[(i64)(first + i / RISING) * CONDITION + width_offset(LEVELS) + i % RISING];
  for (int i = thread; i < STREAMS * VOCAB; i += THREADS) shared.logits[i / VOCAB][i % VOCAB] = p.logits[(i64)first * VOCAB + i];
  team_sync(THREADS);
  Ring ring{shared, memory + FIXED_BYTES, p, 0, 0, 0};
  for (int step = 0; step < p.steps; step++) {
    const u64 place = p.position + step;
    choose(ring, step, (int)(place % POOL_OF[0]), first);
    run_levels<0>(ring, place, depth_at(place), first, p.tables, p.pool_bias, p.ssm, p.conv);
    if (p.all_logits)
      for (int i = thread; i < STREAMS * VOCAB; i += THREADS)
        p.all_logits[((i64)step * p.streams + first) * VOCAB + i] = shared.logits[i / VOCAB][i % VOCAB];
  }
  for (int i = thread; i < STREAMS * FRAMES; i += THREADS) {
    float* const to = p.frames + (i64)(first + i / FRAMES) * 2 * FRAMES + i % FRAMES;
    to[0] = shared.buffer[i / FRAMES][i % FRAMES], to[FRAMES] = shared.queue[i / FRAMES][i % FRAMES];
  }
  for (int i = thread; i < STREAMS * VOCAB; i += THREADS) p.logits[(i64)first * VOCAB + i] = shared.logits[i / VOCAB][i % VOCAB];
}
