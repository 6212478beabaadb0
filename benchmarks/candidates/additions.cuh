// What the candidates need beyond the package's prelude.cuh.
// Waits until `threads` threads of the block have come to the barrier `id`, 1 to 15.
__device__ __forceinline__ void barrier_of(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// The block's shared memory whose size the launch says.
__device__ __forceinline__ u8* dynamic_shared() {
  extern __shared__ __align__(128) u8 memory[];
  return memory;
}

// sum (16 x 8) += a (16 x 8, or 16 x 4) b by tensor cores, factors in tf32 (the lower 13 bits are ignored). Lane 4g + q
// holds of a: rows g and g + 8 of column q, then of column q + 4; of b: rows q, q + 4 of column g; of the sum: columns 2q,
// 2q + 1 of row g, then of row g + 8.
__device__ __forceinline__ void multiply_tf32(float (&sum)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
__device__ __forceinline__ void multiply_tf32(float (&sum)[4], float a0, float a1, float b0) {
  asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b0)));
}
