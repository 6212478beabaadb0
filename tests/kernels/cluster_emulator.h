// Runs a CUDA kernel written for thread-block clusters on a host processor: what prelude.cuh and cluster.cuh are on a GPU.
//
// Every thread is a fiber; a warp's lanes meet at shuffles and tensor-core products. Stores to other blocks and bulk copies
// land after a random time, in any order, and their target is filled with NaN as soon as they are issued; warps are
// scheduled at random. So a read that does not wait for its barrier, and a buffer that is written while it is still read,
// show as NaN in the results, and a wrong count as a deadlock. x86-64 only.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#if defined(DTYPE) && DTYPE == 0
typedef float T;
#else
typedef u16 T;
#endif
#define LOG2E 1.4426950408889634f
#define FULL 0xffffffffu
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
struct Index { u32 x, y, z; };

// ---- fibers

asm(R"(
.text
.globl emulator_swap
emulator_swap:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
extern "C" void emulator_swap(void** save, void* load);

struct Deposit { uint4 a; uint2 b; u64 value; };
struct Warp { u64 count = 0; Deposit box[2][32]; };
struct Block {
  u8* memory;
  u64 arrived = 0, team_arrived = 0;
  std::vector<Warp> warps;
};
struct Fiber {
  void* stack_pointer;
  std::vector<u8> stack;
  Index thread;
  Block* block;
  u32 rank;
  u64 collectives = 0, syncs = 0, team_syncs = 0, cluster_syncs = 0;
  bool done = false, unfenced = false;  // unfenced: has waited for a barrier since its last fence
};
struct Event { u64 when; std::function<void()> land; };

struct Machine {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Event> events;
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  u64 now = 0, progress = 0, cluster_arrived = 0;
  std::mt19937 random;
  std::function<void()> body;
  Index block_index;
  bool failed = false;
};
static Machine machine;

static inline void fail(const char* what) {
  if (!machine.failed) fprintf(stderr, "emulator: %s\n", what);
  machine.failed = true;
}
static inline void pause_fiber() { emulator_swap(&machine.current->stack_pointer, machine.scheduler); }
template <typename F> static inline void wait_until(F condition) {
  while (!condition()) pause_fiber();
  machine.progress++;
}
static void enter() {
  machine.body();
  machine.current->done = true;
  for (;;) pause_fiber();
}
static inline void later(std::function<void()> land) {
  machine.events.push_back({machine.now + 1 + machine.random() % 40, std::move(land)});
}

#define threadIdx (machine.current->thread)
#define blockIdx (machine.block_index)

// ---- what a warp does together

static inline Deposit* meet(const Deposit& mine) {
  Fiber& f = *machine.current;
  Warp& warp = f.block->warps[f.thread.x / 32];
  const u64 n = f.collectives++;
  warp.box[n & 1][f.thread.x % 32] = mine;
  warp.count++;
  wait_until([&] { return warp.count >= 32 * (n + 1); });
  return warp.box[n & 1];
}
inline void __syncwarp() { meet({}); }
template <typename V> inline V lane_value(V v, int (*from)(int, int), int argument) {
  Deposit mine{};
  memcpy(&mine.value, &v, sizeof v);
  Deposit* all = meet(mine);
  const int source = from(threadIdx.x % 32, argument);
  V result;
  memcpy(&result, &all[source].value, sizeof v);
  return result;
}
template <typename V> inline V __shfl_xor_sync(u32, V v, int i) { return lane_value(v, [](int l, int i) { return l ^ i; }, i); }
template <typename V> inline V __shfl_sync(u32, V v, int i) { return lane_value(v, [](int, int i) { return i; }, i); }
template <typename V> inline V __shfl_up_sync(u32, V v, int i) {
  return lane_value(v, [](int l, int i) { return l >= i ? l - i : l; }, i);
}
inline float bf16(u32 v) { v <<= 16; float f; memcpy(&f, &v, 4); return f; }
inline void multiply(float (&sum)[4], uint4 a, uint2 b) {
  Deposit* all = meet({a, b, 0});
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  auto half = [](u32 word, int i) { return bf16(word >> (16 * i) & 0xffff); };
  for (int k = 0; k < 16; k++) {
    const int holder = k % 8 / 2, i = k % 2;
    const uint4 rows = all[g * 4 + holder].a;
    const float low = half(k < 8 ? rows.x : rows.z, i), high = half(k < 8 ? rows.y : rows.w, i);
    for (int j = 0; j < 2; j++) {
      const uint2 column = all[(2 * q + j) * 4 + holder].b;
      const float v = half(k < 8 ? column.x : column.y, i);
      sum[j] += low * v;
      sum[2 + j] += high * v;
    }
  }
}

// ---- blocks and clusters

inline u8* dynamic_shared() { return machine.current->block->memory; }
inline u32 read_clock() { return 0; }
inline u32 cluster_rank() { return machine.current->rank; }
inline void __syncthreads() {
  Fiber& f = *machine.current;
  const u64 n = ++f.syncs;
  f.block->arrived++;
  wait_until([&] { return f.block->arrived >= n * f.block->warps.size() * 32; });
}
inline int fresh_thread() { return threadIdx.x; }
inline void team_sync(int threads) {
  Fiber& f = *machine.current;
  if ((int)f.thread.x >= threads) fail("a thread outside the team is at its barrier");
  const u64 n = ++f.team_syncs;
  f.block->team_arrived++;
  wait_until([&] { return f.block->team_arrived >= n * threads; });
}
template <int COUNT> inline void take_registers() {}
template <int COUNT> inline void leave_registers() {}
inline void cluster_sync() {
  const u64 n = ++machine.current->cluster_syncs;
  machine.cluster_arrived++;
  wait_until([&] { return machine.cluster_arrived >= n * machine.fibers.size(); });
}
inline u32 shared_address(const void* p) {
  const i64 offset = (const u8*)p - machine.current->block->memory;
  if (offset < 0 || offset >= 1 << 24) fail("an address outside shared memory");
  return (machine.current->rank << 24) | (u32)offset;
}
inline u32 in_block(u32 address, u32 rank) { return (address & 0xffffff) | rank << 24; }
inline u8* resolve(u32 address) { return machine.blocks[address >> 24].memory + (address & 0xffffff); }

struct Barrier { int bytes; short pending; u16 count : 15, phase : 1; };
static_assert(sizeof(Barrier) == 8, "");
inline void check(Barrier* b) {
  if (b->pending < 0) fail("more arrivals than a barrier's count");
  if (b->pending == 0 && b->bytes == 0) b->phase ^= 1, b->pending = b->count;
}
inline void barrier_init(u64* bar, u32 count) { *(Barrier*)bar = {0, (short)count, (u16)count, 0}; }
inline void barrier_init_done() {}
inline void barrier_arrive(u64* bar) { Barrier* b = (Barrier*)bar; b->pending--; check(b); }
inline void barrier_expect(u64* bar, u32 bytes) { Barrier* b = (Barrier*)bar; b->bytes += bytes, b->pending--; check(b); }
inline bool barrier_test(u64* bar, u32 parity) { return ((Barrier*)bar)->phase != parity; }
inline void wait_for(u64* bar, u32 parity) {
  wait_until([=] { return barrier_test(bar, parity); });
  machine.current->unfenced = true;
}
inline void fence_before_copies() { machine.current->unfenced = false; }
inline void wait_for_cluster(u64* bar, u32 parity) { wait_for(bar, parity); }
inline void landed(Barrier* b, int bytes) { b->bytes -= bytes; check(b); }

template <typename V> inline void send(u32 to, V v, u32 bar) {
  if (to >> 24 != bar >> 24 || to % sizeof(V)) fail("a store and its barrier do not fit");
  u8* target = resolve(to);
  memset(target, 0xff, sizeof v);
  later([=] { memcpy(target, &v, sizeof v); landed((Barrier*)resolve(bar), sizeof v); });
}
inline u64 keep_policy() { return 0; }
inline void bulk_copy(void* to, const void* from, u32 bytes, u64* bar, u64) {
  if (machine.current->unfenced) fail("no fence between a wait and a bulk copy");
  if ((u64)to % 16 || (u64)from % 16 || bytes % 16) fail("a bulk copy is not aligned");
  memset(to, 0xff, bytes);
  later([=] { memcpy(to, from, bytes); landed((Barrier*)bar, bytes); });
}

// ---- numbers

inline float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
inline float __int_as_float(int v) { return __uint_as_float(v); }
inline u32 __float_as_uint(float v) { u32 u; memcpy(&u, &v, 4); return u; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float ex2(float v) { return exp2f(v); }
inline float rsqrt_of(float v) { return 1 / sqrtf(v); }
inline float sigmoid(float v) { return 1 / (1 + expf(-v)); }
inline float softplus(float v) { return v > 0 ? v + log1pf(expf(-v)) : log1pf(expf(v)); }
inline u16 to_bf16(float v) {
  u32 bits = __float_as_uint(v);
  if (std::isnan(v)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
#if defined(DTYPE) && DTYPE == 0
inline float from_float(float v) { return v; }
inline float to_float(float v) { return v; }
#else
inline u16 from_float(float v) { return to_bf16(v); }
inline float to_float(u16 v) { return bf16(v); }
#endif

// ---- a launch: clusters one after the other; 0, or 1 after a deadlock or a misuse (stderr says which)

static int launch(int clusters, int cluster, int threads, int shared_bytes, u32 seed, std::function<void()> body) {
  constexpr int STACK = 64 << 10;
  for (int c = 0; c < clusters; c++) {
    machine = Machine();
    machine.random.seed(seed + c);
    machine.body = body;
    machine.block_index = {(u32)(c * cluster), 0, 0};
    machine.blocks.resize(cluster);
    std::vector<std::vector<u8>> memory(cluster, std::vector<u8>(shared_bytes + 128, 0xff));
    machine.fibers.resize((size_t)cluster * threads);
    for (int b = 0; b < cluster; b++) {
      machine.blocks[b].memory = (u8*)(((u64)memory[b].data() + 127) & ~127ull);
      machine.blocks[b].warps.resize(threads / 32);
    }
    for (size_t i = 0; i < machine.fibers.size(); i++) {
      Fiber& f = machine.fibers[i];
      f.rank = i / threads;
      f.block = &machine.blocks[f.rank];
      f.thread = {(u32)(i % threads), 0, 0};
      f.stack.resize(STACK);
      u64* top = (u64*)(((u64)f.stack.data() + STACK) & ~15ull);
      *--top = 0;
      *--top = (u64)enter;
      top -= 6;
      memset(top, 0, 48);
      f.stack_pointer = top;
    }
    const size_t warps = machine.fibers.size() / 32;
    size_t left = machine.fibers.size();
    u64 last_progress = 0, idle = 0;
    while (left) {
      machine.now++;
      const u32 slow = machine.random() % 8 == 0 ? machine.random() % cluster : cluster;  // a block falls behind
      for (size_t i = 0; i < warps; i++) {
        if (machine.random() % 4 == 0) continue;
        const size_t warp = (i + machine.now) % warps;
        if (machine.fibers[warp * 32].rank == slow) continue;
        for (size_t lane = 0; lane < 32; lane++) {
          Fiber& f = machine.fibers[warp * 32 + lane];
          if (f.done) continue;
          machine.current = &f;
          machine.block_index.x = c * cluster + f.rank;
          emulator_swap(&machine.scheduler, f.stack_pointer);
          if (f.done) left--;
        }
      }
      for (size_t i = 0; i < machine.events.size();) {
        if (machine.events[i].when <= machine.now) {
          auto land = std::move(machine.events[i].land);
          machine.events[i] = std::move(machine.events.back());
          machine.events.pop_back();
          land();
          machine.progress++;
        } else i++;
      }
      idle = machine.progress == last_progress ? idle + 1 : 0;
      last_progress = machine.progress;
      if (idle > 2000) fail("a deadlock");
      if (machine.failed) return 1;
    }
    if (!machine.events.empty()) return fail("blocks ended before what was sent to them"), 1;
  }
  return 0;
}
