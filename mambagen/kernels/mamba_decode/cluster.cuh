// The instructions of a thread-block cluster (compute capability 9.0): stores into another block's shared memory that
// count bytes on that block's barrier, bulk copies from global memory, and the tensor cores' product. No header needed.
// Everything below prelude.cuh and this file that the decoder uses is plain C++, so that it can also run on a host.

__device__ __forceinline__ u8* dynamic_shared() {
  extern __shared__ __align__(128) u8 memory[];
  return memory;
}

__device__ __forceinline__ u32 read_clock() { u32 c; asm volatile("mov.u32 %0, %%clock;" : "=r"(c)); return c; }
__device__ __forceinline__ u64 nanoseconds() { u64 t; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)); return t; }
__device__ __forceinline__ u32 cluster_rank() { u32 r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// The address, in the cluster's window, of the same place in another block's shared memory.
__device__ __forceinline__ u32 in_block(u32 address, u32 rank) {
  u32 r; asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank)); return r;
}

__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(u64* bar, u32 bytes) {
  asm volatile("{ .reg .b64 s; mbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1; }"
               ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
// Until the barrier's phase of this parity is over. SCOPE is that of the threads whose writes are then seen: those that
// brought the phase to its end.
#define WAIT(NAME, SCOPE)                                                                                               \
  __device__ __forceinline__ void NAME(u64* bar, u32 parity) {                                                          \
    u32 done;                                                                                                           \
    const u64 start = WATCHDOG ? nanoseconds() : 0;                                                                     \
    do {                                                                                                                \
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire." SCOPE                                            \
                   ".shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"                                              \
                   : "=r"(done) : "r"(shared_address(bar)), "r"(parity) : "memory");                                    \
      if (WATCHDOG && !done && nanoseconds() - start > WATCHDOG * 1000000ull) {                                         \
        printf("block %d thread %d waits for ever: barrier %u, parity %u\n", blockIdx.x, threadIdx.x,                   \
               shared_address(bar) - shared_address(dynamic_shared()), parity);                                         \
        asm volatile("trap;");                                                                                          \
      }                                                                                                                 \
    } while (!done);                                                                                                    \
  }
WAIT(wait_for, "cta")
WAIT(wait_for_cluster, "cluster")  // for what other blocks have sent

// The thread's number, of which nothing is computed before: what depends on it is not kept in registers over a long loop.
__device__ __forceinline__ int fresh_thread() { int t = threadIdx.x; asm volatile("" : "+r"(t)); return t; }

// All warps of a group of four ask for so many registers a thread, or keep only so many (multiples of 8).
template <int COUNT> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> __device__ __forceinline__ void leave_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// A barrier of the block's first `threads` threads (all warps of them, and no others).
__device__ __forceinline__ void team_sync(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }
// Asynchronous stores to another block; its barrier counts the bytes when they have landed.
__device__ __forceinline__ void send(u32 to, float a, u32 bar) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               ::"r"(to), "r"(__float_as_uint(a)), "r"(bar) : "memory");
}
__device__ __forceinline__ void send(u32 to, float2 a, u32 bar) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];"
               ::"r"(to), "r"(__float_as_uint(a.x)), "r"(__float_as_uint(a.y)), "r"(bar) : "memory");
}
__device__ __forceinline__ void send(u32 to, uint4 a, u32 bar) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
               ::"r"(to), "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(bar) : "memory");
}

// Weights, which are read again at every token, are the last to leave the second-level cache.
__device__ __forceinline__ u64 keep_policy() {
  u64 p; asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p)); return p;
}
// Between a wait for memory that others have read and a copy into it. Copies come another way (the async proxy) than loads
// and stores, and nothing else orders the two: without it a copy was seen to overtake loads made before the barrier.
__device__ __forceinline__ void fence_before_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void bulk_copy(void* to, const void* from, u32 bytes, u64* bar, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(bar)), "l"(policy) : "memory");
}

// sum += a b on 16 x 16 and 16 x 8 bfloat16.
__device__ __forceinline__ void multiply(float (&sum)[4], uint4 a, uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
}
__device__ __forceinline__ float rsqrt_of(float v) { float r; asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
