// What prelude.cuh gives the scan kernels, on the emulator of cluster_emulator.h: asynchronous copies fill their target with
// NaN until they are waited for; tensor-core factors lose the 13 bits that tf32 lacks.
#if DTYPE == 0
typedef float2 Pair;
#else
typedef u32 Pair;
#endif
#define LN2 0.6931471805599453f
struct Grid { u32 x, y, z; };
static Grid gridDim;
static inline Index block_of_grid() {
  const u32 i = machine.block_index.x;
  return {i % gridDim.x, i / gridDim.x % gridDim.y, i / (gridDim.x * gridDim.y)};
}
#undef blockIdx
#define blockIdx (block_of_grid())
inline i64 min(i64 a, i64 b) { return a < b ? a : b; }
inline float2 widen(Pair v) {
#if DTYPE == 0
  return v;
#else
  return {bf16(v & 0xffff), bf16(v >> 16)};
#endif
}
inline void store_pair(T* p, float a, float b) { p[0] = from_float(a), p[1] = from_float(b); }
inline void barrier_wait(u64* bar, u32 parity) { wait_for(bar, parity); }
inline u32 __ballot_sync(u32, bool v) {
  Deposit mine{};
  mine.value = v;
  Deposit* all = meet(mine);
  u32 bits = 0;
  for (int i = 0; i < 32; i++) bits |= (u32)all[i].value << i;
  return bits;
}

struct Named { u64 arrived = 0; std::vector<u64> mine; };
static Named named[16];
static u32 named_block = 0xffffffff;
inline void barrier_of(int id, int threads) {
  if (named_block != machine.block_index.x) {
    named_block = machine.block_index.x;
    for (Named& n : named) n.arrived = 0, n.mine.assign(1024, 0);
  }
  Named& n = named[id];
  const u64 round = ++n.mine[threadIdx.x];
  n.arrived++;
  wait_until([&] { return n.arrived >= round * threads; });
}

struct Copy { u8 *to; u8 bytes[16]; int size; };
static std::vector<std::vector<Copy>> copies;  // of every thread
template <int size> inline void copy(void* to, const void* from, int bytes) {
  if ((u64)to % size || (bytes && (u64)from % size)) fail("a copy is not aligned");
  Copy c{(u8*)to, {}, size};
  memcpy(c.bytes, from, bytes);
  memset(to, 0xff, size);
  copies[threadIdx.x].push_back(c);
}
inline void copy_commit() {}
template <int pending> inline void copy_wait() {
  static_assert(pending == 0, "groups that stay under way are not emulated");
  for (const Copy& c : copies[threadIdx.x]) memcpy(c.to, c.bytes, c.size);
  copies[threadIdx.x].clear();
}

inline float tf32(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }
template <int K> inline void multiply_columns(float (&sum)[4], const float (&a)[K / 2], const float (&b)[K / 4]) {
  Deposit mine{};
  memcpy(&mine.a, a, sizeof a);
  memcpy(&mine.b, b, sizeof b);
  Deposit* all = meet(mine);
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  for (int k = 0; k < K; k++) {
    float rows[4], column[2][2];
    memcpy(rows, &all[g * 4 + k % 4].a, sizeof rows);
    for (int j = 0; j < 2; j++) {
      memcpy(column[j], &all[(2 * q + j) * 4 + k % 4].b, sizeof column[j]);
      const float v = tf32(column[j][k / 4]);
      sum[j] += tf32(rows[k / 4 * 2]) * v;
      sum[2 + j] += tf32(rows[k / 4 * 2 + 1]) * v;
    }
  }
}
inline void multiply_tf32(float (&sum)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  multiply_columns<8>(sum, {a0, a1, a2, a3}, {b0, b1});
}
inline void multiply_tf32(float (&sum)[4], float a0, float a1, float b0) { multiply_columns<4>(sum, {a0, a1}, {b0}); }
#define Warp ScanWarp  // the kernel has a struct of that name
