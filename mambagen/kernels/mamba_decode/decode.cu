// A whole Mamba language model stepped in one launch: all layers, many tokens, sampling inside (README.md derives it).
//
// A cluster of CLUSTER blocks serves STREAMS streams. Each block owns EC channels of every layer and OT tiles of 16
// channels of the residual stream. Per layer three exchanges through distributed shared memory, each a set of
// asynchronous stores that count bytes on the receiver's barrier (no cluster barrier, no buffer is written before all
// who read it have answered):
//   mixed     partial sums of x_proj over the block's channels, to every block
//   partial   partial sums of out_proj over the block's channels, to the block that owns those rows of the residual
//   residual  the new residual, split into two bfloat16, to every block; squares: its sums of squares
// Weights come in the order in which they are used, by bulk copies of a warp of its own, the feeder, which run ahead as
// far as the ring allows: whoever computes never stops to order them.
//
// A tile of the product has 16 outputs as rows and 8 columns: column 2s + t is part t (high, low) of stream s of four, so
// that activations count to 16 bits at no cost. Lane 4g + q holds rows 2g and 2g + 1 of stream q.
//
// Macros: CLUSTER, STREAMS, LAYERS, D (d_model, padded), EC, RP (rank of dt, padded), VOCAB, TERMS (1: weights in
// bfloat16; 2: in two, high and low), HEAD_SPLIT (1: each block computes its own part of the head), SLOTS, SLOT_BYTES,
// RESIDENT (1: all weights fit the ring and are copied once), FIXED_BYTES (of Shared), EARLY_OUT.
// For finding faults, 0 otherwise: DUMP (1: leaves every stage), PROFILE (1: clock cycles of every part of a layer by warp of
// the first block), WATCHDOG (milliseconds after which a wait is given up with a message).
// Registers for weights of in_proj that wait for their activations, as EARLY_OUT for out_proj.
constexpr int EARLY_IN = STREAMS > 8 ? 32 : 64;
constexpr int AHEAD_PASSES = STREAMS > 8 ? 3 : STREAMS > 4 ? 4 : 8;  // states that wait for their pass of the scan
constexpr int WARPS = 8, THREADS = 32 * WARPS;      // that compute; the feeder comes after them
// The feeder brings three idle warps, as registers change hands among four warps: 168 a thread at the launch, then these.
constexpr int ALL_THREADS = THREADS + 128, MANY = 232, FEW = 40;
static_assert(THREADS * MANY + 128 * FEW <= 65536 && THREADS % 128 == 0, "a multiprocessor's registers");
constexpr int NT = (STREAMS + 3) / 4;               // column tiles
constexpr int KD = D / 16, KE = EC / 16;            // steps of the sums over the residual's and the block's channels
constexpr int IN_TILES = 2 * EC / 16, OT = KD / CLUSTER;
constexpr int XR = RP + 32, X_TILES = XR / 16;      // rows of x_proj: dt, B, C
constexpr int FRAGMENT = 512 * TERMS;               // bytes of a tile's step
constexpr int E = EC * CLUSTER;

__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int parts(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int largest_divisor(int n, int limit) { while (n % limit) limit--; return limit; }

// The residual in quads of channels: QUADS of each stream belong to this block. A task is a quad and a receiving block.
constexpr int QUADS = OT * 4, TASKS = parts(STREAMS * QUADS * CLUSTER, THREADS);
constexpr int WARP_QUADS = 32 / CLUSTER;
constexpr int REDUCED = QUADS % WARP_QUADS == 0 ? WARP_QUADS : (QUADS % 8 == 0 ? least(8, WARP_QUADS) : least(4, WARP_QUADS));
constexpr int SQUARES = CLUSTER * (QUADS / REDUCED);  // sums of squares that arrive for each stream
static_assert(QUADS % REDUCED == 0 && WARP_QUADS % REDUCED == 0, "a group of quads lies in one stream and one warp");

// The head: HT tiles in this block; where there are fewer tiles than warps, the sum is cut into HEAD_PARTS.
constexpr int HT = HEAD_SPLIT ? VOCAB / 16 / CLUSTER : VOCAB / 16;
constexpr int HEAD_PARTS = HT >= WARPS ? 1 : largest_divisor(KD, HT == 1 ? 8 : HT == 2 ? 4 : HT < 5 ? 2 : 1);
static_assert(!HEAD_SPLIT || VOCAB % (16 * CLUSTER) == 0, "a divided head has whole tiles");

// The scan: four lanes a channel, four states a lane; PASSES of 64 channels, whose states are fetched GROUP ahead.
constexpr int PASSES = parts(STREAMS * EC, THREADS / 4), GROUP = largest_divisor(PASSES, least(PASSES, AHEAD_PASSES));

// Chunks of the ring.
__host__ __device__ constexpr int in_chunk(int tiles) { return least(KD, SLOT_BYTES / (tiles * FRAGMENT)); }
constexpr int IN_CHUNK = in_chunk(IN_TILES), HEAD_CHUNK = in_chunk(HT);          // steps a chunk
constexpr int X_CHUNK = least(KE, SLOT_BYTES / (X_TILES * FRAGMENT)), OUT_CHUNK = least(KE, SLOT_BYTES / (KD * FRAGMENT));
static_assert(IN_CHUNK && X_CHUNK && OUT_CHUNK && HEAD_CHUNK, "a slot holds a step of every product");
constexpr int CHANNEL_FLOATS = 4 + 3 + 16 + RP;  // conv weight; conv bias, dt bias, D; A log2(e); dt_proj
constexpr int PARAMETER_BYTES = EC * CHANNEL_FLOATS * 4;
static_assert(PARAMETER_BYTES <= SLOT_BYTES, "a slot holds a layer's parameters");
constexpr int IN_CHUNKS = parts(KD, IN_CHUNK), X_CHUNKS = parts(KE, X_CHUNK), OUT_CHUNKS = parts(KE, OUT_CHUNK);
constexpr int HEAD_CHUNKS = parts(KD, HEAD_CHUNK), LAYER_CHUNKS = IN_CHUNKS + 1 + X_CHUNKS + OUT_CHUNKS;
// The chunks of a layer in their order, then those of the head.
__host__ __device__ constexpr int chunk_bytes(int i) {
  if (i < IN_CHUNKS) return least(IN_CHUNK, KD - i * IN_CHUNK) * IN_TILES * FRAGMENT;
  if (i == IN_CHUNKS) return PARAMETER_BYTES;
  i -= IN_CHUNKS + 1;
  if (i < X_CHUNKS) return least(X_CHUNK, KE - i * X_CHUNK) * X_TILES * FRAGMENT;
  i -= X_CHUNKS;
  if (i < OUT_CHUNKS) return least(OUT_CHUNK, KE - i * OUT_CHUNK) * KD * FRAGMENT;
  i -= OUT_CHUNKS;
  return least(HEAD_CHUNK, KD - i * HEAD_CHUNK) * HT * FRAGMENT;
}
static_assert(!RESIDENT || SLOTS == LAYERS * LAYER_CHUNKS + HEAD_CHUNKS, "a slot for every chunk");
constexpr i64 LAYER_BYTES = (i64)FRAGMENT * (IN_TILES * KD + X_TILES * KE + KD * KE) + PARAMETER_BYTES;
constexpr i64 BLOCK_BYTES = LAYERS * LAYER_BYTES + (i64)FRAGMENT * HT * KD;

// Rows of activations split in two: per quad four high and four low parts. Rows of neighbouring streams lie half of the
// banks apart.
__host__ __device__ constexpr int split_row(int channels) { return channels % 32 == 16 ? channels * 4 : channels * 4 + 64; }
constexpr int D_ROW = split_row(D), E_ROW = split_row(EC), F_ROW = EC % 32 == 16 ? EC : EC + 16;

struct Parameters {
  const u8* weights;       // (CLUSTER, BLOCK_BYTES)
  const float* embedding;  // (VOCAB, D)
  const float* squares;    // (VOCAB,) sums of squares of the embedding's rows
  const float* bias;       // (VOCAB,)
  float* ssm;              // (LAYERS, streams, E, 16)
  float4* conv;            // (LAYERS, streams, E): the last three inputs, oldest first
  float* logits;           // (streams, VOCAB): of the next token, before and after
  const u32* stream_ids;   // (streams,)
  const int* forced;       // (steps, streams) or null: tokens to read instead of drawing them
  int* tokens;             // (steps, streams) or null: the tokens drawn
  float* all_logits;       // (steps, streams, VOCAB) or null: after each token
  float* dump;             // with DUMP: (steps, LAYERS, streams, DUMP_ROW)
  u64 position;            // tokens that the streams have seen: a part of the random number
  Sampling sampling;
  int steps, streams;      // streams: of all clusters, a multiple of STREAMS
  float epsilon, inverse_width;
};

struct __align__(128) Shared {
  u8 residual[STREAMS][D_ROW];           // split, received
  u8 convolved_split[STREAMS][E_ROW], y_split[STREAMS][E_ROW];
  float mixed_parts[CLUSTER][STREAMS * XR];    // received
  float4 partial[CLUSTER][STREAMS * QUADS];    // received
  float squares[STREAMS][parts(SQUARES, 4) * 4];  // received
  float mixed[STREAMS][XR];
  float convolved[STREAMS][F_ROW], gate[STREAMS][F_ROW];
  float head[HEAD_PARTS][STREAMS][VOCAB];      // received with HEAD_SPLIT
  float logits[STREAMS][VOCAB];
  int token[STREAMS];
  u64 full[SLOTS], empty[SLOTS];
  u64 mixed_here, partial_here, residual_here, squares_here, head_here;
};
static_assert(sizeof(Shared) <= FIXED_BYTES && FIXED_BYTES % 128 == 0, "the ring comes after the fixed part");

// The feeder's place in the ring.
struct Feeder {
  Shared& shared;
  u8* to;
  u64 policy;
  int slot = 0;
  u32 parity = 1;  // of the end of the slot's last use; a barrier that nobody has used counts as passed with 1

  __device__ __forceinline__ void copy(const u8*& from, u32 bytes) {
    if (!RESIDENT) wait_for(&shared.empty[slot], parity), fence_before_copies();
    barrier_expect(&shared.full[slot], bytes);
    bulk_copy(to, from, bytes, &shared.full[slot], policy);
    from += bytes, to += RESIDENT ? bytes : SLOT_BYTES;
    if (++slot == SLOTS) slot = 0, parity ^= 1, to -= RESIDENT ? 0 : SLOTS * SLOT_BYTES;
  }
  // The chunks of all tokens in the order of their use; weights that stay are copied once.
  __device__ __forceinline__ void copy_all(const u8* const weights, int steps) {
    for (int step = 0; step < (RESIDENT ? 1 : steps); step++) {
      const u8* from = weights;
#pragma unroll 1
      for (int layer = 0; layer < LAYERS; layer++)
#pragma unroll
        for (int i = 0; i < LAYER_CHUNKS; i++) copy(from, chunk_bytes(i));
#pragma unroll 1
      for (int i = 0; i < HEAD_CHUNKS; i++) copy(from, chunk_bytes(LAYER_CHUNKS + i));
    }
  }
};

// The copies as the other warps see them: the next chunk, and the parity with which its slot becomes full.
struct Ring {
  Shared& shared;
  u8* memory;
  int slot = 0;
  u32 parity = 0, offset = 0;

  __device__ __forceinline__ void start() {  // of a token
    if (RESIDENT) slot = 0, offset = 0;
  }
  __device__ __forceinline__ const u8* wait() {
    wait_for(&shared.full[slot], parity);
    return memory + offset;
  }
  // Every warp goes past every chunk, whether it has read from it or not.
  __device__ __forceinline__ void release(int which) const {
    __syncwarp();
    if (!RESIDENT && (threadIdx.x & 31) == 0) barrier_arrive(&shared.empty[which]);
  }
  __device__ __forceinline__ void advance(u32 bytes) {
    slot++;
    offset += RESIDENT ? bytes : SLOT_BYTES;
    if (!RESIDENT && slot == SLOTS) slot = 0, offset = 0, parity ^= 1;
  }
};

// What a lane multiplies: its column of a step, four channels of one part of one stream; zeros beyond the last stream.
template <int ROW> __device__ __forceinline__ uint2 column(const u8 (*rows)[ROW], int nt, int k) {
  const int lane = threadIdx.x & 31, stream = 4 * nt + (lane >> 3);
  if (STREAMS % 4 && stream >= STREAMS) return make_uint2(0, 0);
  return *(const uint2*)(rows[stream] + k * 64 + (lane & 3) * 16 + (lane >> 2 & 1) * 8);
}

// TILES x 16 outputs, tile i * WARPS + warp for a warp, from STEPS x 16 channels. `fetch` takes the weights of the first
// EARLY steps into registers, so that they are there when the activations arrive.
template <int TILES, int STEPS, int CHUNK, int REGISTERS, int CHAINS> struct Product {
  static constexpr int MINE = parts(TILES, WARPS);
  static constexpr int EARLY = least(STEPS, REGISTERS / (4 * MINE * TERMS));
  uint4 weights[most(EARLY, 1)][MINE][TERMS];
  const u8* chunk;

  __device__ __forceinline__ static bool has(int i) {
    return TILES % WARPS == 0 || i * WARPS + (int)(threadIdx.x >> 5) < TILES;
  }
  __device__ __forceinline__ void load(Ring& ring, int k, uint4 (&to)[MINE][TERMS]) {
    if (k % CHUNK == 0) chunk = ring.wait();
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < MINE; i++)
      if (has(i)) {
#pragma unroll
        for (int t = 0; t < TERMS; t++)
          to[i][t] = *(const uint4*)(chunk + (((k % CHUNK) * TILES + i * WARPS + warp) * TERMS + t) * 512 + lane * 16);
      }
    if (k % CHUNK == CHUNK - 1 || k == STEPS - 1) {
      ring.release(ring.slot);
      ring.advance((k % CHUNK + 1) * TILES * FRAGMENT);
    }
  }
  __device__ __forceinline__ void fetch(Ring& ring) {
#pragma unroll
    for (int k = 0; k < EARLY; k++) load(ring, k, weights[k]);
  }
  // Rows 2g and 2g + 1 of each tile, for stream q of each column tile.
  template <int ROW>
  __device__ __forceinline__ void finish(Ring& ring, const u8 (*rows)[ROW], float2 (&result)[MINE][NT]) {
    float sum[MINE][CHAINS][NT][4] = {};
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      uint4 late[MINE][TERMS];
      if (k >= EARLY) load(ring, k, late);
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        const uint2 b = column<ROW>(rows, nt, k);
#pragma unroll
        for (int i = 0; i < MINE; i++)
          if (has(i)) {
#pragma unroll
            for (int t = 0; t < TERMS; t++) multiply(sum[i][k % CHAINS][nt], k < EARLY ? weights[k < EARLY ? k : 0][i][t] : late[i][t], b);
          }
      }
    }
#pragma unroll
    for (int i = 0; i < MINE; i++)
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        float4 all = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int c = 0; c < CHAINS; c++)
          all.x += sum[i][c][nt][0], all.y += sum[i][c][nt][1], all.z += sum[i][c][nt][2], all.w += sum[i][c][nt][3];
        result[i][nt] = make_float2(all.x + all.y, all.z + all.w);
      }
  }
};

__device__ __forceinline__ float low_half(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_half(u32 v) { return __uint_as_float(v & 0xffff0000u); }
// Two numbers as two pairs of bfloat16, high parts and what they leave.
__device__ __forceinline__ uint2 split(float a, float b) {
  const u32 high = pack_bf16(a, b);
  return make_uint2(high, pack_bf16(a - low_half(high), b - high_half(high)));
}
__device__ __forceinline__ uint4 split(float4 v) {
  const uint2 a = split(v.x, v.y), b = split(v.z, v.w);
  return make_uint4(a.x, b.x, a.y, b.y);
}
__device__ __forceinline__ float dot(float4 a, float4 b) { return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x))); }
__device__ __forceinline__ float over_quad(float v) {
  v += __shfl_xor_sync(FULL, v, 1);
  return v + __shfl_xor_sync(FULL, v, 2);
}
__device__ __forceinline__ float inverse_norm(const Shared& shared, const Parameters& p, int stream) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < SQUARES; i++) sum += shared.squares[stream][i];
  return rsqrt_of(fmaf(sum, p.inverse_width, p.epsilon));
}

#if PROFILE
#define MARK(part) { const u32 now = read_clock(); spent[part] += now - last; last = now; }
#else
#define MARK(part)
#endif
constexpr int MARKS = 12;

constexpr int DUMP_ROW = D + 4 * E + XR + E;  // residual before, x, convolved, gate, y, mixed, dt
__device__ __forceinline__ float* dump_row(const Parameters& p, int step, int layer, int stream) {
  return p.dump + (((i64)step * LAYERS + layer) * p.streams + stream) * DUMP_ROW;
}

__device__ __forceinline__ void step_all(const Parameters& p, Shared& shared, u8* memory, const u32 rank) {
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, g = lane >> 2, q = lane & 3;
  const int first = blockIdx.x / CLUSTER * STREAMS;  // stream of this cluster
  Ring ring{shared, memory};
#if PROFILE
  u32 spent[MARKS] = {}, last = read_clock();
#endif
  u32 parity = 0;  // of the exchanges of a layer, which all happen once a layer
  u32 head_parity = 0;

  Product<IN_TILES, KD, IN_CHUNK, EARLY_IN, 4> in;
  Product<X_TILES, KE, X_CHUNK, 32, 4> mix;
  Product<KD, KE, OUT_CHUNK, EARLY_OUT, 2> out;
  float4 residual[TASKS];

  // The states of the next passes and the convolution's windows are on their way to registers long before their use;
  // each is read, written and read again by the same thread.
  const int channel = thread >> 2;
  auto state_of = [&](int layer, int pass) -> float4* {
    const int at = pass * (THREADS / 4) + channel, stream = at / EC, c = at % EC;
    const i64 row = ((i64)layer * p.streams + first + stream) * E + rank * EC + c;
    return (float4*)p.ssm + row * 4 + q;
  };
  auto has_state = [&](int pass) {
    return STREAMS * EC % (THREADS / 4) == 0 || pass * (THREADS / 4) + channel < STREAMS * EC;
  };
  float4 h[GROUP];
#pragma unroll
  for (int i = 0; i < GROUP; i++)
    if (has_state(i)) h[i] = *state_of(0, i);

  auto window_of = [&](int layer, int i, int nt) -> float4* {
    const i64 row = ((i64)layer * p.streams + first + 4 * nt + q) * E + rank * EC + (warp + i * WARPS) * 16 + 2 * g;
    return p.conv + row;
  };
  auto has_window = [&](int i, int nt) {
    return warp + i * WARPS < IN_TILES / 2 && (STREAMS % 4 == 0 || 4 * nt + q < STREAMS);
  };
  constexpr int IN_MINE = parts(IN_TILES, WARPS);
  float4 window[IN_MINE][NT][2];
#pragma unroll
  for (int i = 0; i < IN_MINE; i++)
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
      if (has_window(i, nt)) window[i][nt][0] = window_of(0, i, nt)[0], window[i][nt][1] = window_of(0, i, nt)[1];

  for (int i = thread; i < STREAMS * VOCAB; i += THREADS) shared.logits[i / VOCAB][i % VOCAB] = p.logits[(i64)first * VOCAB + i];
  team_sync(THREADS);

  for (int step = 0; step < p.steps; step++) {
    ring.start();
    in.fetch(ring);

    // ---- the token, which every block draws for itself from the same logits
#pragma unroll 1
    for (int stream = warp; stream < STREAMS; stream += WARPS) {
      int token;
      if (p.forced) token = most(0, least(p.forced[(i64)step * p.streams + first + stream], VOCAB - 1));
      else token = draw_token(shared.logits[stream], p.bias, p.sampling, p.position + step, p.stream_ids[first + stream]);
      if (lane == 0) {
        shared.token[stream] = token;
        if (p.tokens && rank == 0) p.tokens[(i64)step * p.streams + first + stream] = token;
      }
    }
    team_sync(THREADS);
    for (int i = thread; i < STREAMS * (D / 4); i += THREADS) {
      const int stream = i / (D / 4), quad = i % (D / 4);
      *(uint4*)(shared.residual[stream] + quad * 16) = split(*(const float4*)(p.embedding + (i64)shared.token[stream] * D + quad * 4));
    }
    for (int i = thread; i < STREAMS * SQUARES; i += THREADS)
      shared.squares[i / SQUARES][i % SQUARES] = i % SQUARES ? 0.f : p.squares[shared.token[i / SQUARES]];
#pragma unroll
    for (int i = 0; i < TASKS; i++) {
      const int quad = (i * THREADS + thread) / CLUSTER;
      if (quad < STREAMS * QUADS) {
        const int row = (quad % QUADS / 4 * CLUSTER + rank) * 16 + quad % 4 * 4;
        residual[i] = *(const float4*)(p.embedding + (i64)shared.token[quad / QUADS] * D + row);
      }
    }
    team_sync(THREADS);

    for (int layer = 0; layer < LAYERS; layer++) {
      const int next = layer + 1 < LAYERS ? layer + 1 : 0;
      // ---- x and z of the block's channels; convolution
      if (layer) {
        wait_for_cluster(&shared.residual_here, parity ^ 1);
        if (thread == 0) barrier_expect(&shared.residual_here, STREAMS * D * 4);
      }
      MARK(0)  // until the residual has come
      float2 xz[IN_MINE][NT];
      in.finish(ring, shared.residual, xz);
      MARK(1)  // in_proj
      if (layer) {
        wait_for_cluster(&shared.squares_here, parity ^ 1);
        if (thread == 0) barrier_expect(&shared.squares_here, STREAMS * SQUARES * 4);
      }
      const float* const table = (const float*)ring.wait();  // the layer's parameters, held until the scan is done
      const int table_slot = ring.slot;
      ring.advance(PARAMETER_BYTES);
      const float *conv_weight = table, *conv_bias = table + 4 * EC, *dt_bias = conv_bias + EC, *skip = dt_bias + EC;
      const float *A = skip + EC, *dt_weight = A + 16 * EC;
#if DUMP
      if (rank == 0)
        for (int i = thread; i < STREAMS * D; i += THREADS) {
          const u16* quad = (const u16*)(shared.residual[i / D] + i % D / 4 * 16);
          dump_row(p, step, layer, first + i / D)[i % D] = to_float(quad[i % 4]) + to_float(quad[i % 4 + 4]);
        }
#endif
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        const int stream = 4 * nt + q;
        if (STREAMS % 4 && stream >= STREAMS) continue;
        const float scale = inverse_norm(shared, p, stream);
#pragma unroll
        for (int i = 0; i < IN_MINE; i++) {
          const int tile = warp + i * WARPS;
          if (tile >= IN_TILES) continue;
          const int c = tile % (IN_TILES / 2) * 16 + 2 * g;
          const float2 v = make_float2(xz[i][nt].x * scale, xz[i][nt].y * scale);
          if (tile < IN_TILES / 2) {
            float4 &a = window[i][nt][0], &b = window[i][nt][1];
            const float4 u = *(const float4*)(conv_weight + 4 * c), w = *(const float4*)(conv_weight + 4 * c + 4);
            float x = fmaf(u.w, v.x, fmaf(u.z, a.z, fmaf(u.y, a.y, fmaf(u.x, a.x, conv_bias[c]))));
            float y = fmaf(w.w, v.y, fmaf(w.z, b.z, fmaf(w.y, b.y, fmaf(w.x, b.x, conv_bias[c + 1]))));
            window_of(layer, i, nt)[0] = make_float4(a.y, a.z, v.x, 0.f);
            window_of(layer, i, nt)[1] = make_float4(b.y, b.z, v.y, 0.f);
            a = window_of(next, i, nt)[0], b = window_of(next, i, nt)[1];
            x *= sigmoid(x), y *= sigmoid(y);
            *(float2*)&shared.convolved[stream][c] = make_float2(x, y);
            const uint2 both = split(x, y);
            u8* to = shared.convolved_split[stream] + c / 4 * 16 + c % 4 * 2;
            *(u32*)to = both.x, *(u32*)(to + 8) = both.y;
#if DUMP
            float* row = dump_row(p, step, layer, first + stream) + D + rank * EC + c;
            row[0] = v.x, row[1] = v.y, row[E] = x, row[E + 1] = y;
#endif
          } else {
            *(float2*)&shared.gate[stream][c] = make_float2(v.x * sigmoid(v.x), v.y * sigmoid(v.y));
          }
        }
      }
      MARK(2)  // norm, convolution, gate
      mix.fetch(ring);
      team_sync(THREADS);

      MARK(3)  // until all have written
      // ---- what all channels say about dt, B and C
      float2 partial_mixed[mix.MINE][NT];
      mix.finish(ring, shared.convolved_split, partial_mixed);
#pragma unroll
      for (int i = 0; i < mix.MINE; i++)
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
          const int stream = 4 * nt + q;
          if (!mix.has(i) || (STREAMS % 4 && stream >= STREAMS)) continue;
          const u32 to = shared_address(&shared.mixed_parts[rank][stream * XR + (warp + i * WARPS) * 16 + 2 * g]);
#pragma unroll
          for (int j = 0; j < CLUSTER; j++) {
            const u32 peer = (rank + j) % CLUSTER;
            send(in_block(to, peer), partial_mixed[i][nt], in_block(shared_address(&shared.mixed_here), peer));
          }
        }
      MARK(4)  // x_proj and its sends
      out.fetch(ring);
      wait_for_cluster(&shared.mixed_here, parity);
      if (thread == 0) barrier_expect(&shared.mixed_here, CLUSTER * STREAMS * XR * 4);
      MARK(5)  // until the partial sums have come
      for (int i = thread; i < STREAMS * XR; i += THREADS) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < CLUSTER; j++) sum += shared.mixed_parts[j][i];
        shared.mixed[i / XR][i % XR] = sum;
      }
      team_sync(THREADS);

      MARK(6)  // their sums
      // ---- the scan's step
#pragma unroll 1
      for (int base = 0; base < PASSES; base += GROUP) {
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
          const int at = (base + i) * (THREADS / 4) + channel, stream = at / EC, c = at % EC;
          const bool mine = has_state(base + i);
          const int s = mine ? stream : 0;  // all lanes take part in the sums
          const float* const mixed = shared.mixed[s];
          float dt = 0.f;
#pragma unroll
          for (int r = 0; r < RP; r += 16)
            dt += dot(*(const float4*)(dt_weight + c * RP + r + 4 * q), *(const float4*)(mixed + r + 4 * q));
          dt = softplus(over_quad(dt) + dt_bias[c]);
          const float x = shared.convolved[s][c], u = dt * x;
          const float4 a = *(const float4*)(A + c * 16 + 4 * q);
          const float4 B = *(const float4*)(mixed + RP + 4 * q), C = *(const float4*)(mixed + RP + 16 + 4 * q);
          float4 state = mine ? h[i] : make_float4(0.f, 0.f, 0.f, 0.f);
          state.x = fmaf(ex2(dt * a.x), state.x, u * B.x);
          state.y = fmaf(ex2(dt * a.y), state.y, u * B.y);
          state.z = fmaf(ex2(dt * a.z), state.z, u * B.z);
          state.w = fmaf(ex2(dt * a.w), state.w, u * B.w);
          const float y = fmaf(skip[c], x, over_quad(dot(state, C))) * shared.gate[s][c];
          if (mine) {
            *state_of(layer, base + i) = state;
            const bool more = base + GROUP < PASSES;
            h[i] = *(more ? state_of(layer, base + GROUP + i) : state_of(next, i));
            if (q == 0) {
              const uint2 both = split(y, 0.f);
              u8* to = shared.y_split[stream] + c / 4 * 16 + c % 4 * 2;
              *(u16*)to = (u16)both.x, *(u16*)(to + 8) = (u16)both.y;
#if DUMP
              float* row = dump_row(p, step, layer, first + stream) + D + rank * EC + c;
              row[2 * E] = shared.gate[stream][c], row[3 * E] = y, row[4 * E + XR] = dt;
#endif
            }
          }
        }
      }
#if DUMP
      if (rank == 0)
        for (int i = thread; i < STREAMS * XR; i += THREADS)
          dump_row(p, step, layer, first + i / XR)[D + 4 * E + i % XR] = shared.mixed[i / XR][i % XR];
#endif
      MARK(7)  // the scan
      ring.release(table_slot);
      team_sync(THREADS);

      // ---- the block's part of the new residual, to those who own it
      float2 rows[out.MINE][NT];
      out.finish(ring, shared.y_split, rows);
#pragma unroll
      for (int i = 0; i < out.MINE; i++)
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
          const int tile = warp + i * WARPS, stream = 4 * nt + q;
          if (!out.has(i) || (STREAMS % 4 && stream >= STREAMS)) continue;
          const u32 owner = tile % CLUSTER;
          const u32 to = shared_address((float*)shared.partial[rank] + (stream * OT + tile / CLUSTER) * 16 + 2 * g);
          send(in_block(to, owner), rows[i][nt], in_block(shared_address(&shared.partial_here), owner));
        }
      MARK(8)  // out_proj and its sends, with the wait before
      if (layer + 1 < LAYERS) in.fetch(ring);

      MARK(9)  // weights of the next layer into registers
      // ---- the owner sums and tells all
#pragma unroll
      for (int i = 0; i < TASKS; i++) {
        const int task = i * THREADS + thread, quad = task / CLUSTER, peer = task % CLUSTER;
        if (task - lane >= STREAMS * QUADS * CLUSTER) continue;  // none of the warp's
        if (i == 0) {
          wait_for_cluster(&shared.partial_here, parity);
          if (thread == 0) barrier_expect(&shared.partial_here, CLUSTER * STREAMS * QUADS * 16);
        }
        const bool mine = quad < STREAMS * QUADS;
        float square = 0.f;
        if (mine) {
          float4 sum = shared.partial[0][quad];
#pragma unroll
          for (int j = 1; j < CLUSTER; j++) {
            const float4 other = shared.partial[j][quad];
            sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
          }
          float4& r = residual[i];
          r.x += sum.x, r.y += sum.y, r.z += sum.z, r.w += sum.w;
          const int stream = quad / QUADS, row = (quad % QUADS / 4 * CLUSTER + rank) * 16 + quad % 4 * 4;
          send(in_block(shared_address(shared.residual[stream] + row * 4), peer), split(r),
               in_block(shared_address(&shared.residual_here), peer));
          square = dot(r, r);
        }
#pragma unroll
        for (int j = CLUSTER; j < REDUCED * CLUSTER; j *= 2) square += __shfl_xor_sync(FULL, square, j);
        if (mine && quad % REDUCED == 0) {
          const u32 to = shared_address(&shared.squares[quad / QUADS][(rank * QUADS + quad % QUADS) / REDUCED]);
          send(in_block(to, peer), square, in_block(shared_address(&shared.squares_here), peer));
        }
      }
      MARK(10)  // the new residual
      parity ^= 1;
    }

    // ---- the head
    constexpr int HEAD_MINE = parts(HT, WARPS), PART = KD / HEAD_PARTS;
    const int part = HEAD_PARTS > 1 ? warp / HT : 0, tile0 = HEAD_PARTS > 1 ? warp % HT : warp;
    wait_for_cluster(&shared.residual_here, parity ^ 1);
    if (thread == 0) barrier_expect(&shared.residual_here, STREAMS * D * 4);
    float sum[HEAD_MINE][NT][4] = {};
    for (int k = 0; k < KD; k += HEAD_CHUNK) {
      const u8* const chunk = ring.wait();
      const int count = least(HEAD_CHUNK, KD - k);
      for (int j = 0; j < count; j++) {
        if (HEAD_PARTS > 1 && (k + j) / PART != part) continue;
#pragma unroll
        for (int i = 0; i < HEAD_MINE; i++) {
          const int tile = tile0 + i * WARPS;
          if (tile >= HT) continue;
#pragma unroll
          for (int t = 0; t < TERMS; t++) {
            const uint4 a = *(const uint4*)(chunk + ((j * HT + tile) * TERMS + t) * 512 + lane * 16);
#pragma unroll
            for (int nt = 0; nt < NT; nt++) multiply(sum[i][nt], a, column<D_ROW>(shared.residual, nt, k + j));
          }
        }
      }
      ring.release(ring.slot);
      ring.advance(count * HT * FRAGMENT);
    }
#pragma unroll
    for (int i = 0; i < HEAD_MINE; i++)
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        const int tile = tile0 + i * WARPS, stream = 4 * nt + q;
        if (tile >= HT || part >= HEAD_PARTS || (STREAMS % 4 && stream >= STREAMS)) continue;
        const float2 v = make_float2(sum[i][nt][0] + sum[i][nt][1], sum[i][nt][2] + sum[i][nt][3]);
        if (HEAD_SPLIT) {
          const u32 to = shared_address(&shared.head[part][stream][(tile * CLUSTER + rank) * 16 + 2 * g]);
#pragma unroll
          for (int j = 0; j < CLUSTER; j++) {
            const u32 peer = (rank + j) % CLUSTER;
            send(in_block(to, peer), v, in_block(shared_address(&shared.head_here), peer));
          }
        } else {
          *(float2*)&shared.head[part][stream][tile * 16 + 2 * g] = v;
        }
      }
    wait_for_cluster(&shared.squares_here, parity ^ 1);
    if (thread == 0) barrier_expect(&shared.squares_here, STREAMS * SQUARES * 4);
    if (HEAD_SPLIT) {
      wait_for_cluster(&shared.head_here, head_parity);
      if (thread == 0) barrier_expect(&shared.head_here, HEAD_PARTS * STREAMS * VOCAB * 4);
      head_parity ^= 1;
    }
    team_sync(THREADS);
    for (int i = thread; i < STREAMS * VOCAB; i += THREADS) {
      const int stream = i / VOCAB, id = i % VOCAB;
      float v = 0.f;
#pragma unroll
      for (int j = 0; j < HEAD_PARTS; j++) v += shared.head[j][stream][id];
      v *= inverse_norm(shared, p, stream);
      shared.logits[stream][id] = v;
      if (rank == 0) {
        if (p.all_logits) p.all_logits[((i64)step * p.streams + first) * VOCAB + i] = v;
        if (step == p.steps - 1) p.logits[(i64)first * VOCAB + i] = v;
      }
    }
    team_sync(THREADS);
    MARK(11)  // everything outside the layers
  }
#if PROFILE
  if (blockIdx.x == 0 && lane == 0)
    for (int i = 0; i < MARKS; i++) p.dump[warp * MARKS + i] = (float)spent[i];
#endif
}

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) decode(const __grid_constant__ Parameters p) {
  u8* const memory = dynamic_shared();
  Shared& shared = *(Shared*)memory;
  const u32 rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], WARPS);
    barrier_init(&shared.mixed_here, 1), barrier_init(&shared.partial_here, 1), barrier_init(&shared.residual_here, 1);
    barrier_init(&shared.squares_here, 1), barrier_init(&shared.head_here, 1);
    barrier_init_done();
    barrier_expect(&shared.mixed_here, CLUSTER * STREAMS * XR * 4);
    barrier_expect(&shared.partial_here, CLUSTER * STREAMS * QUADS * 16);
    barrier_expect(&shared.residual_here, STREAMS * D * 4);
    barrier_expect(&shared.squares_here, STREAMS * SQUARES * 4);
    barrier_expect(&shared.head_here, HEAD_PARTS * STREAMS * VOCAB * 4);
  }
  cluster_sync();  // all barriers of all blocks are ready
  if (threadIdx.x < THREADS) {
    take_registers<MANY>();
    step_all(p, shared, memory + FIXED_BYTES, rank);
  } else {
    leave_registers<FEW>();
    if (threadIdx.x == THREADS)
      Feeder{shared, memory + FIXED_BYTES, keep_policy()}.copy_all(p.weights + rank * BLOCK_BYTES, p.steps);
  }
  cluster_sync();  // no block leaves while another may still send to it
}
