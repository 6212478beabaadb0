// A whole audio U-Net stepped in one launch: all levels, many samples, sampling inside (README.md says how it is laid out).
//
// A block serves STREAMS streams and runs everything: no block waits for another, but those of a pair to draw. The matrices
// of a level lie one after another in the order of their use, and a warp of its own, the feeder, copies them into a ring of
// slots in shared memory, as far ahead as the ring allows and across samples and levels, so that the second-level cache is
// read without a pause. Each warp gives a slot back as soon as its lanes have their weights in registers. Everything is
// inlined: a call would keep the ring's place in local memory, and take from the compiler what it knows of shared memory.
//
// A row of a product is summed by lanes of one warp, each with some of its inputs, and shuffles leave the sum with the lane
// that goes on with it: a layer has four barriers and no partial sums in memory. A lane takes several rows, which share the
// activations that it reads, and reads its first weights of a product before the barrier that the activations wait for.
// `Shape` says who takes what; pack_rows in cuda.py lays the matrices out for it. A word holds two weights: its lower half,
// and the whole word, whose last bits are the lower half's (the packing rounds with that in mind). Activations, sums and
// states are float32.
//
// Macros: LEVELS; WIDTHS, RANKS, LAYERS_OF, DOWNS, POOLS (lists, one number a level; ranks in multiples of 4), VOCAB,
// STREAMS, PAIRS (1: blocks of one stream, of which two form a cluster and draw together with guidance), WARPS (that
// compute), SLOTS, SLOT_BYTES, FIXED_BYTES (of Shared), WATCHDOG (see cluster.cuh).
constexpr int THREADS = 32 * WARPS;              // the feeder comes after them, in a group of four warps
// The compiler gives a thread as many registers as a launch of ALL_THREADS can have, in multiples of 8 (GIVEN), where chips
// can pass them on (not so compute capability 12, where passing on is left out). What the block has is then shared out.
constexpr int ALL_THREADS = THREADS + 128, FEW = 24, GIVEN = 65536 / ALL_THREADS / 8 * 8;
constexpr int MANY = (GIVEN * ALL_THREADS - 128 * FEW) / THREADS / 8 * 8;
static_assert(THREADS % 128 == 0 && ALL_THREADS <= 1024, "registers are taken by groups of four warps");
static_assert(FEW <= GIVEN && GIVEN <= MANY && MANY <= 248, "of a thread; more than it was given must be there to take");
static_assert(!PAIRS || STREAMS == 1, "a pair has two blocks");
constexpr int MOST_AHEAD = 64 / WARPS;           // units of weights that fit into registers; with 16 warps 4
constexpr int WIDTH_OF[] = {WIDTHS}, RANK_OF[] = {RANKS}, LAYER_COUNT[] = {LAYERS_OF}, DOWN_OF[] = {DOWNS};
constexpr int POOL_OF[] = {POOLS};  // 1 at the centre

__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int parts(int a, int b) { return (a + b - 1) / b; }

// How many rows a lane takes where `lanes` share a row, so that no warp has two turns.
__host__ __device__ constexpr int rows_of_lane(int out, int lanes) {
  int rows = 1;
  while (rows * THREADS < out * lanes) rows *= 2;
  return rows;
}
// As many lanes as possible share a row while a lane has four rows at most: more rows for the activations that a lane
// reads, but also more sums to exchange.
__host__ __device__ constexpr int lanes_of_row(int out, int k) {
  int lanes = 1;
  while (lanes < 16 && k / 8 % (2 * lanes) == 0) lanes *= 2;
  while (lanes > 1 && rows_of_lane(out, lanes) > 4) lanes /= 2;
  return lanes;
}

// How a product is spread. A lane has EACH rows of its warp (lane % SPREAD, SPREAD more, ...) and, of every step's inputs,
// part lane / SPREAD: four of the first half and four of the second. So neighbours read the same activations or those
// beside them. A unit is one row's 16 bytes of every lane.
template <int OUT, int K> struct Shape {
  static constexpr int LANES = lanes_of_row(OUT, K), EACH = rows_of_lane(OUT, LANES), SPREAD = 32 / LANES;
  static constexpr int USED = parts(OUT, SPREAD * EACH);  // warps
  static constexpr bool FULL_UP = OUT == WARPS * SPREAD * EACH;
  static constexpr int UNITS = K / (8 * LANES) * EACH, UNIT_BYTES = USED * 32 * 16;
  static constexpr bool PAIR = UNITS % 2 == 0 && 2 * UNIT_BYTES <= SLOT_BYTES;
  static constexpr int CHUNK = UNITS % 4 == 0 && 4 * UNIT_BYTES <= SLOT_BYTES ? 4 : PAIR ? 2 : 1;  // units of a slot
  static constexpr int TURN = most(CHUNK, EACH);   // units of whole slots and whole steps
  static constexpr int AHEAD = least(UNITS, MOST_AHEAD);  // units that are read before the inputs are there
  static constexpr int KEPT = least(LANES, EACH);  // rows whose sums end in different lanes
  static_assert(K % 8 == 0 && EACH <= MOST_AHEAD && UNIT_BYTES <= SLOT_BYTES, "see unsupported_shape in cuda.py");
  static_assert(AHEAD % TURN == 0, "both are powers of two or all");
};

constexpr int widest() {
  int most_of = 0;
  for (int i = 0; i < LEVELS; i++) most_of = most(most_of, WIDTH_OF[i]);
  return most_of;
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

// A layer's small parameters, in floats from its start: per channel the four taps; bias of the convolution, 0, bias of dt,
// skip; A log2(e); dt_proj.
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
  float mixed[STREAMS][MIXED];
  float buffer[STREAMS][most(frame_floats(), 1)], queue[STREAMS][most(frame_floats(), 1)];
  float rising[STREAMS][most(RISING, 1)];  // of the condition, what every sample needs in the middle of a level
  float logits[STREAMS][VOCAB], bias[VOCAB], head_bias[VOCAB];
  float others[PAIRS ? 2 : 1][PAIRS ? VOCAB : 1];  // received: the logits of the pair's other stream, by turns
  u64 others_here[2];
  u64 seed[STREAMS];
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
    constexpr u32 bytes = S::CHUNK * S::UNIT_BYTES;
#pragma unroll 1
    for (int unit = 0; unit < S::UNITS; unit += S::CHUNK) {
      wait_for(&shared.empty[slot], parity);
      fence_before_copies();
      barrier_expect(&shared.full[slot], bytes);
      bulk_copy(ring + slot * SLOT_BYTES, from, bytes, &shared.full[slot], policy);
      from += bytes;
      if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
  }
  template <int LEVEL> __device__ __forceinline__ void feed_levels(int depth) {
    constexpr int W = WIDTH_OF[LEVEL], C = 2 * W, POOLED = LEVEL ? POOL_OF[most(LEVEL - 1, 0)] * WIDTH_OF[most(LEVEL - 1, 0)] : 8;
    if constexpr (LEVEL > 0) feed<W, POOLED>();
#pragma unroll 1
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
  int slot;
  u32 parity;
  int thread;  // this one's number, taken afresh where what was computed of it shall not be kept in registers

  __device__ __forceinline__ const u8* take() {
    wait_for(&shared.full[slot], parity);
    return memory + slot * SLOT_BYTES;
  }
  // The warp has read what it took.
  __device__ __forceinline__ void give_back() {
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(&shared.empty[slot]);
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
};

__device__ __forceinline__ float lower(u32 word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float upper(u32 word) { return __uint_as_float(word); }
__device__ __forceinline__ float dot(float4 a, float4 b) { return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x))); }
__device__ __forceinline__ float over_quad(float v) {
  v += __shfl_xor_sync(FULL, v, 1);
  return v + __shfl_xor_sync(FULL, v, 2);
}

// A product's first weights, in registers.
template <int OUT, int K> struct Weights {
  typedef Shape<OUT, K> S;
  uint4 first[S::AHEAD];

  __device__ __forceinline__ void take(Ring& ring) { take_some(ring, first); }

  template <int UNITS> __device__ __forceinline__ static void take_some(Ring& ring, uint4 (&w)[UNITS]) {
    const int thread = S::USED == WARPS ? ring.thread : least(ring.thread, 32 * S::USED - 1);
#pragma unroll
    for (int i = 0; i < UNITS; i += S::CHUNK) {
      const u8* const chunk = ring.take();
#pragma unroll
      for (int j = 0; j < S::CHUNK; j++) w[i + j] = *(const uint4*)(chunk + j * S::UNIT_BYTES + thread * 16);
      ring.give_back();
    }
  }
};

// What a product leaves in a lane: see for_rows.
template <int OUT, int K> struct Sums {
  typedef Shape<OUT, K> S;
  float of[STREAMS][S::EACH];
  float squares[STREAMS];  // of all inputs, where asked for, and an epsilon for each

  template <bool SQUARES, int UNITS>
  __device__ __forceinline__ void add(const uint4 (&w)[UNITS], const float4 (&x)[STREAMS][UNITS / S::EACH][2]) {
#pragma unroll
    for (int i = 0; i < UNITS; i++)
#pragma unroll
      for (int s = 0; s < STREAMS; s++) {
        const float4 a = x[s][i / S::EACH][0], b = x[s][i / S::EACH][1];
        float& to = of[s][i % S::EACH];
        to = fmaf(lower(w[i].x), a.x, to), to = fmaf(upper(w[i].x), a.y, to);
        to = fmaf(lower(w[i].y), a.z, to), to = fmaf(upper(w[i].y), a.w, to);
        to = fmaf(lower(w[i].z), b.x, to), to = fmaf(upper(w[i].z), b.y, to);
        to = fmaf(lower(w[i].w), b.z, to), to = fmaf(upper(w[i].w), b.w, to);
        if (SQUARES && i % S::EACH == 0) squares[s] += dot(a, a) + dot(b, b);
      }
  }
  // Adds up what the lanes of a row have. A lane with several rows gives the sums of half of them away, then of a quarter.
  template <bool SQUARES> __device__ __forceinline__ void gather(int lane) {
#pragma unroll
    for (int s = 0; s < STREAMS; s++)
#pragma unroll
      for (int bit = 16, half = S::KEPT / 2; bit >= S::SPREAD; bit /= 2, half /= 2) {
        if (SQUARES) squares[s] += __shfl_xor_sync(FULL, squares[s], bit);
#pragma unroll
        for (int i = 0; i < S::EACH; i += S::KEPT) {
          if (half == 0) of[s][i] += __shfl_xor_sync(FULL, of[s][i], bit);
#pragma unroll
          for (int j = i; j < i + half; j++) {
            const float low = of[s][j], high = of[s][j + half];
            of[s][j] = (lane & bit ? high : low) + __shfl_xor_sync(FULL, lane & bit ? low : high, bit);
          }
        }
      }
  }
};

// A lane's part of the inputs of some steps.
template <int OUT, int K, int ROW, int STEPS>
__device__ __forceinline__ void read_inputs(float4 (&to)[STREAMS][STEPS][2], const float (*x)[ROW], int step, int lane) {
  typedef Shape<OUT, K> S;
  const float* const from = x[0] + step * 8 * S::LANES + lane / S::SPREAD * 4;
#pragma unroll
  for (int s = 0; s < STREAMS; s++)
#pragma unroll
    for (int i = 0; i < STEPS; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) to[s][i][h] = *(const float4*)(from + s * ROW + (2 * i + h) * 4 * S::LANES);
}

// A matrix times x[stream][K]. `meanwhile` is called once nothing more is taken from the ring, if possible while inputs
// are on their way: it takes the first weights of the next product.
template <bool SQUARES, int OUT, int K, int ROW, typename F>
__device__ __forceinline__ Sums<OUT, K> product(Ring& ring, const Weights<OUT, K>& weights, const float (*x)[ROW], F meanwhile) {
  typedef Shape<OUT, K> S;
  const int lane = ring.thread & 31;
  const bool works = S::USED == WARPS || ring.thread < 32 * S::USED;
  Sums<OUT, K> sums = {};
  if (SQUARES)
#pragma unroll
    for (int s = 0; s < STREAMS; s++) sums.squares[s] = ring.p.epsilon * (K / S::LANES);
  float4 inputs[STREAMS][S::AHEAD / S::EACH][2];
  read_inputs<OUT, K>(inputs, x, 0, lane);
  if (S::UNITS == S::AHEAD) meanwhile();
  if (works) sums.template add<SQUARES>(weights.first, inputs);
  if constexpr (S::UNITS > S::AHEAD) {
#pragma unroll 1
    for (int unit = S::AHEAD; unit < S::UNITS; unit += S::TURN) {
      uint4 w[S::TURN];
      float4 more[STREAMS][S::TURN / S::EACH][2];
      Weights<OUT, K>::take_some(ring, w);
      read_inputs<OUT, K>(more, x, unit / S::EACH, lane);
      if (works) sums.template add<SQUARES>(w, more);
    }
    meanwhile();
  }
  if (works) sums.template gather<SQUARES>(lane);
  return sums;
}

// Calls what(i, row) for the rows whose sums are of[stream][i] in this lane.
template <int OUT, int K, typename F> __device__ __forceinline__ void for_rows(int thread, F what) {
  typedef Shape<OUT, K> S;
  const int lane = thread & 31;
  const int row = (thread >> 5) * S::EACH * S::SPREAD + lane / (32 / S::KEPT) * S::SPREAD + lane % S::SPREAD;
  if (S::LANES > S::KEPT && lane / S::SPREAD % (S::LANES / S::KEPT)) return;  // several lanes have the same sum
#pragma unroll
  for (int i = 0; i < S::EACH; i += S::KEPT)
    if (S::FULL_UP || row + i * S::SPREAD < OUT) what(i, row + i * S::SPREAD);
}

// A layer's small parameters and states, in registers: they come from far, and are asked for a layer ahead where there is room.
template <int LEVEL> struct Held {
  static constexpr int C = 2 * WIDTH_OF[LEVEL], R = RANK_OF[LEVEL];
  static constexpr int PASSES = parts(4 * C, THREADS);
  static constexpr bool FULL_UP = 4 * C % THREADS == 0;
  static constexpr int EACH = Shape<2 * C, C / 2>::EACH;
  static constexpr bool AHEAD = PASSES * (1 + STREAMS) * WARPS < 6 * 16;
  float4 tap[EACH], window[STREAMS][EACH];  // of the channels whose convolution is this lane's, see for_rows
  float bias[EACH];
  float4 a[PASSES], h[STREAMS][PASSES];  // of four states of channel (i THREADS + thread) / 4
  static constexpr int SHARE = R > 4 ? R / 4 : R;  // of a channel's rank: a lane's, or all where that is little
  float w[PASSES][SHARE];
  float2 bias_skip[PASSES];

  __device__ __forceinline__ void take_taps(int thread, const float* table, const float4* conv) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {  // what is not loaded is set too: else it would take up registers in all of the kernel
      tap[i] = make_float4(0.f, 0.f, 0.f, 0.f), bias[i] = 0.f;
#pragma unroll
      for (int s = 0; s < STREAMS; s++) window[s][i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    for_rows<2 * C, C / 2>(thread, [&](int i, int c) {
      if (c >= C) return;
      tap[i] = ((const float4*)table)[c], bias[i] = table[4 * (C + c)];
#pragma unroll
      for (int s = 0; s < STREAMS; s++) window[s][i] = conv[s * C + c];
    });
  }
  __device__ __forceinline__ void take_states(int thread, const float* table, const float* ssm) {
    const float4 *const more = (const float4*)table + C, *const A = more + C;
    const float* const dt_proj = (const float*)(A + 4 * C);
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
      const int unit = FULL_UP ? i * THREADS + thread : least(i * THREADS + thread, 4 * C - 1), c = unit / 4, q = unit % 4;
      a[i] = A[unit], bias_skip[i] = ((const float2*)(more + c))[1];
      const float* const from = dt_proj + c * R + q * SHARE % R;
      if constexpr (SHARE % 4 == 0) {
#pragma unroll
        for (int r = 0; r < SHARE; r += 4) {
          const float4 v = *(const float4*)(from + r);
          w[i][r] = v.x, w[i][r + 1] = v.y, w[i][r + 2] = v.z, w[i][r + 3] = v.w;
        }
      } else {
#pragma unroll
        for (int r = 0; r < SHARE; r++) w[i][r] = from[r];
      }
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

// Layer n: residual += mixer(norm(residual)) (+ its skip), for all streams; `slot` is the frame's in the pool, `ssm` and `conv`
// are the layer's, of the block's first stream. What the next layer needs is asked for as soon as `held` and `in` are free.
template <int LEVEL>
__device__ __forceinline__ void layer(Ring& ring, Held<LEVEL>& held, Weights<4 * WIDTH_OF[LEVEL], WIDTH_OF[LEVEL]>& in,
                                      const float* table, float* ssm, float4* conv, int n, int slot) {
  typedef Held<LEVEL> H;
  constexpr int LAYERS = LAYER_COUNT[LEVEL], DOWN = DOWN_OF[LEVEL];
  constexpr int W = WIDTH_OF[LEVEL], C = H::C, R = H::R, M = R + 32, PASSES = H::PASSES;
  Shared& shared = ring.shared;
  const Parameters& p = ring.p;
  const int thread = ring.thread = fresh_thread(), q = thread & 3;
  const bool adds = DOWN > 0 ? n >= DOWN : n == LAYERS - 1, last = n == LAYERS - 1;
  const int which = DOWN > 0 ? LAYERS - 1 - n : 0;
  const int ahead = last ? 0 : 1;  // layers: the last asks for its own again, which is simpler than for nothing
  Weights<M, C> mix;
  Weights<W, C> out;

  if (!H::AHEAD) held.take_taps(ring.thread, table, conv);
  // the norm's weight is in the matrix, its scale comes after
  const auto in_sums = product<true>(ring, in, shared.residual, [&] { mix.take(ring); });
  for_rows<2 * C, W>(ring.thread, [&](int i, int row) {
#pragma unroll
    for (int s = 0; s < STREAMS; s++) {
      const float x = rsqrt_of(in_sums.squares[s] * (1.f / W)) * in_sums.of[s][i];
      if (row >= C) {
        shared.gate[s][row - C] = x * sigmoid(x);
        continue;
      }
      const float4 old = held.window[s][i], tap = held.tap[i];
      const float sum = fmaf(tap.w, x, fmaf(tap.z, old.z, fmaf(tap.y, old.y, fmaf(tap.x, old.x, held.bias[i]))));
      conv[s * C + row] = make_float4(old.y, old.z, x, 0.f);
      shared.convolved[s][row] = sum * sigmoid(sum);
    }
  });
  team_sync(THREADS);
  const auto mix_sums = product<false>(ring, mix, shared.convolved, [&] {
    out.take(ring);
    if (H::AHEAD) held.take_taps(ring.thread, table + ahead * table_floats(LEVEL), conv + (i64)ahead * p.streams * C);
    else held.take_states(ring.thread, table, ssm);
  });
  for_rows<M, C>(ring.thread, [&](int i, int row) {
#pragma unroll
    for (int s = 0; s < STREAMS; s++) shared.mixed[s][row] = mix_sums.of[s][i];
  });
  team_sync(THREADS);
  float y[STREAMS][PASSES];
#pragma unroll
  for (int s = 0; s < STREAMS; s++) {
    const float4 B = *(const float4*)(shared.mixed[s] + R + 4 * q), Cs = *(const float4*)(shared.mixed[s] + R + 16 + 4 * q);
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
      const int unit = i * THREADS + thread, c = (H::FULL_UP ? unit : least(unit, 4 * C - 1)) / 4;  // all lanes take part
      float dt = 0.f;
#pragma unroll
      for (int r = 0; r < H::SHARE; r++) dt = fmaf(held.w[i][r], shared.mixed[s][q * H::SHARE % R + r], dt);
      dt = softplus((H::SHARE < R ? over_quad(dt) : dt) + held.bias_skip[i].x);
      const float x = shared.convolved[s][c], u = dt * x;
      const float4 rate = held.a[i];
      float4& state = held.h[s][i];
      state.x = fmaf(ex2(dt * rate.x), state.x, u * B.x);
      state.y = fmaf(ex2(dt * rate.y), state.y, u * B.y);
      state.z = fmaf(ex2(dt * rate.z), state.z, u * B.z);
      state.w = fmaf(ex2(dt * rate.w), state.w, u * B.w);
      y[s][i] = fmaf(held.bias_skip[i].y, x, over_quad(dot(state, Cs))) * shared.gate[s][c];
    }
  }
#pragma unroll
  for (int s = 0; s < STREAMS; s++)  // stores after all loads, so that none waits for another channel's
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
      const int unit = i * THREADS + thread;
      if (!H::FULL_UP && unit >= 4 * C) continue;
      ((float4*)ssm)[s * 4 * C + unit] = held.h[s][i];
      if (q == 0) shared.y[s][unit / 4] = y[s][i];
    }
  team_sync(THREADS);
  float old[STREAMS][Shape<W, C>::EACH] = {};
  const auto out_sums = product<false>(ring, out, shared.y, [&] {
    for_rows<W, C>(ring.thread, [&](int i, int row) {
#pragma unroll
      for (int s = 0; s < STREAMS; s++) old[s][i] = shared.residual[s][row] + (adds ? shared.skips[s][which * W + row] : 0.f);
    });
    if (H::AHEAD) held.take_states(ring.thread, table + ahead * table_floats(LEVEL), ssm + (i64)ahead * p.streams * C * 16);
    if (last) in = {};  // set in any case: else the old ones would stay in registers
    else in.take(ring);
  });
  for_rows<W, C>(ring.thread, [&](int i, int row) {
#pragma unroll
    for (int s = 0; s < STREAMS; s++)
      shared.residual[s][row] = before_layer<LEVEL>(shared, n + 1, slot, s, row, old[s][i] + out_sums.of[s][i]);
  });
  team_sync(THREADS);
}

// The logits of a pair of blocks for this step's draw, guided, as both of them compute it; by one warp. The other block sends
// those for the next step but one only when it has had mine for the next, so two places are enough.
__device__ __forceinline__ const float* guided_by_both(Shared& shared, const Parameters& p, int step, int lane) {
  float* const others = shared.others[PAIRS ? step & 1 : 0];
  if (step > 0) {  // those for the first came from memory
    wait_for_cluster(&shared.others_here[step & 1], (step - 1) / 2 & 1);
    if (lane == 0) barrier_expect(&shared.others_here[step & 1], VOCAB * 4);  // for the next step but one
  }
  const bool first = cluster_rank() == 0;
  for (int id = lane; id < VOCAB; id += 32) {
    const float mine = shared.logits[0][id], other = others[id], without = first ? other : mine;
    others[id] = fmaf(p.guidance, (first ? mine : other) - without, without);
  }
  return others;
}

// The next sample of each stream, and its embedding as the residual. `meanwhile` is called before that is waited for.
template <typename F> __device__ __forceinline__ void choose(Ring& ring, int step, int slot, int first, F meanwhile) {
  constexpr int W = WIDTH_OF[0];
  Shared& shared = ring.shared;
  const Parameters& p = ring.p;
  const int s = ring.thread >> 5, lane = ring.thread & 31;  // a warp a stream,
  const int both = p.paired && !PAIRS ? 2 : 1;              // or a pair of them
  const bool draws = s < STREAMS && s % both == 0;
  int token = 0;
  if (draws && !p.forced) {
    const float* logits = shared.logits[s];
    if (PAIRS) logits = guided_by_both(shared, p, step, lane);
    else if (p.paired)
      for (int id = lane; id < VOCAB; id += 32) {
        const float asked = shared.logits[s][id], without = shared.logits[least(s + 1, STREAMS - 1)][id];
        shared.logits[s][id] = fmaf(p.guidance, asked - without, without);
      }
    __syncwarp();
    Sampling how = p.sampling;
    how.seed = shared.seed[s];
    token = draw_token(logits, shared.bias, how, p.position + step, 0);
  }
  meanwhile();
  if (draws)
    for (int to = s; to < s + both; to++) {
      const i64 at = (i64)step * p.streams + first + to;
      if (p.forced) token = p.forced[at];
      if (p.tokens && lane == 0) p.tokens[at] = token;
      for (int row = lane; row < W; row += 32) {
        const float v = p.embedding[(i64)token * W + row] + p.condition[(i64)(first + to) * CONDITION + row];
        shared.residual[to][row] = before_layer<0>(shared, 0, slot, to, row, v);
      }
    }
  team_sync(THREADS);
}

// One frame of a level and what it gives to the one above (level 0: the logits).
template <int LEVEL>
__device__ __forceinline__ void run_level(Ring& ring, int step, int slot, int first, const float* table, const float* pool_bias,
                                          float* ssm, float4* conv) {
  constexpr int W = WIDTH_OF[LEVEL], C = 2 * W, LAYERS = LAYER_COUNT[LEVEL];
  constexpr int ABOVE = most(LEVEL - 1, 0), POOLED = POOL_OF[ABOVE] * WIDTH_OF[ABOVE];  // not used by level 0
  Shared& shared = ring.shared;
  const Parameters& p = ring.p;
  ssm += (i64)first * C * 16, conv += (i64)first * C;
  ring.thread = fresh_thread();
  Held<LEVEL> held;
  Weights<2 * C, W> in;
  const auto meanwhile = [&] {
    if (Held<LEVEL>::AHEAD) held.take_taps(ring.thread, table, conv), held.take_states(ring.thread, table, ssm);
    in.take(ring);
  };
  if constexpr (LEVEL == 0) {
    choose(ring, step, slot, first, meanwhile);
  } else {
    Weights<W, POOLED> down;
    down.take(ring);
    float more[STREAMS][Shape<W, POOLED>::EACH] = {};
    for_rows<W, POOLED>(ring.thread, [&](int i, int row) {
#pragma unroll
      for (int s = 0; s < STREAMS; s++)
        more[s][i] = pool_bias[row] + p.condition[(i64)(first + s) * CONDITION + width_offset(LEVEL) + row];
    });
    const auto frames = (const float(*)[most(frame_floats(), 1)])(&shared.buffer[0][frame_offset(ABOVE)]);
    const auto sums = product<false>(ring, down, frames, meanwhile);
    for_rows<W, POOLED>(ring.thread, [&](int i, int row) {
#pragma unroll
      for (int s = 0; s < STREAMS; s++)
        shared.residual[s][row] = before_layer<LEVEL>(shared, 0, slot, s, row, sums.of[s][i] + more[s][i]);
    });
    team_sync(THREADS);
  }
#pragma unroll 1
  for (int n = 0; n < LAYERS; n++) {
    layer<LEVEL>(ring, held, in, table, ssm, conv, n, slot);
    table += table_floats(LEVEL), ssm += (i64)p.streams * C * 16, conv += (i64)p.streams * C;
  }
  constexpr int OUT = LEVEL > 0 ? POOLED : VOCAB;
  Weights<OUT, W> leaving;
  leaving.take(ring);
  float bias[Shape<OUT, W>::EACH] = {};
  for_rows<OUT, W>(ring.thread, [&](int i, int row) { bias[i] = LEVEL > 0 ? pool_bias[W + row] : shared.head_bias[row]; });
  const auto sums = product<LEVEL == 0>(ring, leaving, shared.residual, [] {});
  for_rows<OUT, W>(ring.thread, [&](int i, int row) {
#pragma unroll
    for (int s = 0; s < STREAMS; s++) {
      if (LEVEL > 0) {
        shared.queue[s][frame_offset(ABOVE) + row] = sums.of[s][i] + bias[i];
        continue;
      }
      const float v = shared.logits[s][row] = fmaf(rsqrt_of(sums.squares[s] * (1.f / W)), sums.of[s][i], bias[i]);
      if (PAIRS) {
        const u32 other = cluster_rank() ^ 1, turn = PAIRS ? step + 1 & 1 : 0;
        send(in_block(shared_address(&shared.others[turn][row]), other), v, in_block(shared_address(&shared.others_here[turn]), other));
      }
    }
  });
  team_sync(THREADS);
}

// Level LEVEL and, where its frame is the last of a pooled one, those below it.
template <int LEVEL>
__device__ __forceinline__ void run_levels(Ring& ring, int step, u64 place, int depth, int first, const float* table,
                                           const float* pool_bias, float* ssm, float4* conv) {
  run_level<LEVEL>(ring, step, (int)(place % POOL_OF[LEVEL]), first, table, pool_bias, ssm, conv);
  if constexpr (LEVEL + 1 < LEVELS)
    if (depth > 1) {
      constexpr int C = 2 * WIDTH_OF[LEVEL], N = LAYER_COUNT[LEVEL];
      const int biases = LEVEL > 0 ? WIDTH_OF[LEVEL] + POOL_OF[most(LEVEL - 1, 0)] * WIDTH_OF[most(LEVEL - 1, 0)] : 0;
      run_levels<LEVEL + 1>(ring, step, place / POOL_OF[LEVEL], depth - 1, first, table + N * table_floats(LEVEL),
                            pool_bias + biases, ssm + (i64)N * ring.p.streams * C * 16, conv + (i64)N * ring.p.streams * C);
    }
}

// All samples of the launch, by the computing warps of a block.
__device__ __forceinline__ void make_samples(const Parameters& p, Shared& shared, u8* ring_memory) {
  constexpr int FRAMES = frame_floats();
  const int thread = threadIdx.x, first = (PAIRS ? blockIdx.x / 2 * 2 + cluster_rank() : blockIdx.x) * STREAMS;
  for (int i = thread; i < STREAMS * FRAMES; i += THREADS) {
    const float* const from = p.frames + (i64)(first + i / FRAMES) * 2 * FRAMES + i % FRAMES;
    shared.buffer[i / FRAMES][i % FRAMES] = from[0], shared.queue[i / FRAMES][i % FRAMES] = from[FRAMES];
  }
  for (int i = thread; i < STREAMS * RISING; i += THREADS)
    shared.rising[i / RISING][i % RISING] = p.condition[(i64)(first + i / RISING) * CONDITION + width_offset(LEVELS) + i % RISING];
  for (int i = thread; i < STREAMS * VOCAB; i += THREADS) shared.logits[i / VOCAB][i % VOCAB] = p.logits[(i64)first * VOCAB + i];
  for (int i = thread; PAIRS && i < VOCAB; i += THREADS) shared.others[0][i] = p.logits[(i64)(first ^ 1) * VOCAB + i];
  for (int i = thread; i < VOCAB; i += THREADS) shared.bias[i] = p.bias[i], shared.head_bias[i] = p.head_bias[i];
  if (thread < STREAMS) shared.seed[thread] = p.seeds[PAIRS ? first & ~1 : first + thread];  // of a pair the first's
  team_sync(THREADS);
  Ring ring{shared, ring_memory, p, 0, 0, thread};
  for (int step = 0; step < p.steps; step++) {
    const u64 place = p.position + step;
    run_levels<0>(ring, step, place, depth_at(place), first, p.tables, p.pool_bias, p.ssm, p.conv);
    if (p.all_logits)
      for (int i = thread; i < STREAMS * VOCAB; i += THREADS)
        p.all_logits[((i64)step * p.streams + first) * VOCAB + i] = shared.logits[i / VOCAB][i % VOCAB];
  }
  for (int i = thread; i < STREAMS * FRAMES; i += THREADS) {
    float* const to = p.frames + (i64)(first + i / FRAMES) * 2 * FRAMES + i % FRAMES;
    to[0] = shared.buffer[i / FRAMES][i % FRAMES], to[FRAMES] = shared.queue[i / FRAMES][i % FRAMES];
  }
  for (int i = thread; i < STREAMS * VOCAB; i += THREADS) p.logits[(i64)first * VOCAB + i] = shared.logits[i / VOCAB][i % VOCAB];
  if (PAIRS && thread == 0) wait_for_cluster(&shared.others_here[p.steps & 1], (p.steps - 1) / 2 & 1);  // all have landed
}

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) decode(const __grid_constant__ Parameters p) {
  u8* const memory = dynamic_shared();
  Shared& shared = *(Shared*)memory;
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < SLOTS; i++) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], WARPS);
    for (int i = 0; PAIRS && i < 2; i++) barrier_init(&shared.others_here[i], 1);
    barrier_init_done();
    for (int i = 0; PAIRS && i < 2; i++) barrier_expect(&shared.others_here[i], VOCAB * 4);
  }
  if (PAIRS) cluster_sync();  // the barriers of both blocks are ready
  else __syncthreads();
  if (thread < THREADS) {
    take_registers<MANY>();
    make_samples(p, shared, memory + FIXED_BYTES);
  } else {
    leave_registers<FEW>();
  }
  if (thread == THREADS) {
    Feeder feeder{shared, memory + FIXED_BYTES, p.weights, keep_policy(), 0, 1};  // an unused slot's phase before the first is over
    for (int step = 0; step < p.steps; step++) {
      feeder.from = p.weights;
      feeder.feed_levels<0>(depth_at(p.position + step));
    }
  }
  if (PAIRS) cluster_sync();  // no block leaves while the other may still send to it
}
