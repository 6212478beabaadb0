// What prelude.cuh gives the scan kernels, on the emulator of cluster_emulator.h: asynchronous copies fill their target with
// NaN until they are waited for.
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
#define Warp ScanWarp  // the kernel has a struct of that name
