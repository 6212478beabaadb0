// What our CUDA C++ kernels share: element types, the few PTX instructions, softplus and sigmoid. No header is needed.
// DTYPE: 0 float, 1 bfloat16, 2 float16. 16-bit elements travel as raw bits and are computed with in float32.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#if DTYPE == 0
typedef float T;
#else
typedef u16 T;
#endif
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define FULL 0xffffffffu

__device__ __forceinline__ float ex2(float v) { float e; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v)); return e; }
__device__ __forceinline__ float rcp(float v) { float e; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v)); return e; }
__device__ __forceinline__ float sigmoid(float v) { return rcp(1.f + ex2(-v * LOG2E)); }

// softplus(v) = max(v, 0) + log1p(exp(-|v|)), the logarithm as e times a minimax polynomial of log1p(e) / e on [0, 1]
// (relative error 2e-7): exact to the last digits for steps of any size, and no MUFU logarithm.
__device__ __forceinline__ float softplus(float v) {
  float e = ex2(-fabsf(v) * LOG2E);
  float p = fmaf(-8.539084720e-03f, e, 4.408920539e-02f);
  p = fmaf(p, e, -1.076811378e-01f); p = fmaf(p, e, 1.774520266e-01f); p = fmaf(p, e, -2.449544885e-01f);
  p = fmaf(p, e, 3.327547707e-01f); p = fmaf(p, e, -4.999740514e-01f); p = fmaf(p, e, 9.999998056e-01f);
  return fmaf(e, p, fmaxf(v, 0.f));
}

__device__ __forceinline__ float to_float(T v) {
#if DTYPE == 0
  return v;
#elif DTYPE == 1
  return __uint_as_float((u32)v << 16);
#else
  float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f;
#endif
}
__device__ __forceinline__ T from_float(float v) {
#if DTYPE == 0
  return v;
#elif DTYPE == 1
  u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r;
#else
  u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r;
#endif
}
// Two neighbours from an address that both lie in one aligned word (8 bytes for float, 4 for 16-bit elements). Loading
// and widening are apart, so that loads can be under way together: a conversion at once would wait for each.
#if DTYPE == 0
typedef float2 Pair;
#else
typedef u32 Pair;
#endif
__device__ __forceinline__ float2 widen(Pair v) {
#if DTYPE == 0
  return v;
#elif DTYPE == 1
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
#else
  return make_float2(to_float((u16)v), to_float((u16)(v >> 16)));
#endif
}
__device__ __forceinline__ float2 load_pair(const T* p) { return widen(*(const Pair*)p); }
__device__ __forceinline__ void store_pair(T* p, float a, float b) {
#if DTYPE == 0
  *(float2*)p = make_float2(a, b);
#elif DTYPE == 1
  u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); *(u32*)p = r;
#else
  u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); *(u32*)p = r;
#endif
}

// Asynchronous copies into shared memory; `bytes` of 0 fills with zeros instead of reading.
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
template <int size> __device__ __forceinline__ void copy(void* to, const void* from, int bytes) {
  if (size == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
  if (size == 8) asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
  if (size == 4) asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// Barriers in shared memory on which warps arrive one by one and wait by phase, so that no warp waits for all others.
__device__ __forceinline__ void barrier_init(u64* bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* bar) {
  asm volatile("{ .reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0]; }" ::"r"(shared_address(bar)) : "memory");
}
__device__ __forceinline__ void barrier_wait(u64* bar, u32 parity) {
  u32 done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(bar)), "r"(parity) : "memory");
#else  // Ampere and Ada ask again and again
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(bar)), "r"(parity) : "memory");
#endif
  } while (!done);
}
