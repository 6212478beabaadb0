// What the candidates for the backward scan have in common: parameters, the tile of inputs, products of tensor cores, the work
// that the warps of a block share, and the last sum.
struct Parameters {
  const T *x, *dt, *z, *B, *C, *dy;
  const float *A, *D, *bias, *saved, *dfinal, *ends;
  const u8* resets;
  T *dx, *ddt, *dz;
  float *dBC, *sums, *dinitial;
  i64 x_batch, x_row, dt_batch, dt_row, z_batch, z_row, B_batch, B_row, C_batch, C_row, dy_batch, dy_row, dz_batch, dz_row;
  i64 length;
  int channels, groups, chunk, chunks;
};

#define CHANNELS 16
#define ROW_COPIES (CHANNELS * (int)sizeof(T) / 16)
#define AHEAD (RING / 2)  // tiles that B and C are brought ahead

#define TENSORS (3 + HAS_Z)
static_assert(TILE == 8, "the 8 steps of a tile are the 8 columns of a tensor-core product");
#define PARTIAL_ROW 40  // 32 sums; rows that differ by up to 3 lie in different banks

struct __align__(16) Stage {
  float h[16][CHANNELS];
  T rows[TENSORS][TILE][CHANNELS];  // x, dt, dy, z
};
// The column of step r in products, so that a lane ends with steps q and q + 4.
__device__ __forceinline__ constexpr int column_of(int r) { return 2 * (r & 3) + (r >> 2); }
__device__ __forceinline__ i64 position(i64 s, i64 length) { return REVERSE ? length - 1 - s : s; }

// ---- sums by tensor cores

// Factors have 10 bits behind the point; the hardware cuts the others off. That is less than the rounding of 16-bit
// elements, and RESTORE takes its mean away (2^-11 times the mean of 1/m over mantissas m). float32 elements are split in
// two factors and lose nothing that matters.
#define SPLIT (DTYPE == 0)
#define RESTORE (SPLIT ? 1.f : 1.000352f)

__device__ __forceinline__ float high_part(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }

// sum (16 x 8) += a (16 x 8) b (8 x 8); A_EXACT, B_EXACT: the factor has no more than 10 bits.
template <bool A_EXACT, bool B_EXACT>
__device__ __forceinline__ void multiply(float (&sum)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  if (SPLIT && !B_EXACT) {
    const float c0 = high_part(b0), c1 = high_part(b1);
    multiply_tf32(sum, a0, a1, a2, a3, b0 - c0, b1 - c1);
    b0 = c0, b1 = c1;
  }
  if (SPLIT && !A_EXACT) {
    const float c0 = high_part(a0), c1 = high_part(a1), c2 = high_part(a2), c3 = high_part(a3);
    multiply_tf32(sum, a0 - c0, a1 - c1, a2 - c2, a3 - c3, b0, b1);
    a0 = c0, a1 = c1, a2 = c2, a3 = c3;
  }
  multiply_tf32(sum, a0, a1, a2, a3, b0, b1);
}

// The block's common work is shared out by rows of a tile: warp w brings rows w, w + WARPS, ... of B and C and adds up
// the same rows of all warps' dB and dC.
#define ROWS (TILE / WARPS)
struct Server {
  const T* from;  // row ``warp`` of the tile that is fetched next; lanes 0-7 of a half warp hold B's pairs of states, 8-15 C's
  float* to;      // row `warp` of the tile that is added up next
  int from_tile, from_row, to_tile, to_row;  // towards later tiles, which means earlier steps, and to the next row of a warp
  int warp, lane;
  Pair next[(ROWS + 1) / 2];

  // A warp fetches two rows at once. left: rows of the tile.
  __device__ __forceinline__ void fetch(int left) {
#pragma unroll
    for (int j = 0; j < (ROWS + 1) / 2; j++) {
      const int row = 2 * j + (lane >> 4);
      next[j] = Pair();
      if ((ROWS % 2 == 0 || row < ROWS) && row * WARPS + warp < left) next[j] = *(const Pair*)(from + 2 * j * from_row);
    }
    from += from_tile;
  }
  __device__ __forceinline__ void bring(float (*BC)[2][8][16]) {
    const int n = (lane & 7) * 2, which = lane >> 3 & 1;
#pragma unroll
    for (int j = 0; j < (ROWS + 1) / 2; j++) {
      const int row = 2 * j + (lane >> 4), r = row * WARPS + warp;
      if (ROWS % 2 == 0 || row < ROWS) *(float2*)&BC[r][which][column_of(r)][n] = widen(next[j]);
    }
  }
  // OWNERS: the warps, or pairs of them, that have a row of sums each.
  template <int OWNERS>
  __device__ __forceinline__ void add_up(const float (*partial)[TILE][PARTIAL_ROW], int left) {
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
      const int r = j * WARPS + warp;
      float sum = partial[0][r][lane];
#pragma unroll
      for (int v = 1; v < OWNERS; v++) sum += partial[v][r][lane];
      if (r < left) to[j * to_row] = sum;
    }
    to += to_tile;
  }
};

// A number that the compiler keeps instead of computing it again from the thread's index.
__device__ __forceinline__ int kept(int v) { return __shfl_sync(FULL, v, threadIdx.x & 31); }

// dB and dC: the blocks' partial sums of a group, added in order. One thread four neighbours of (batch, position, 32).
struct Reduction {
  const float* partial;  // (batch, blocks, length, 32)
  T *dB, *dC;            // (batch, length, groups, 16)
  i64 length, total;     // total: batch * length * groups * 8
  int blocks, groups;
};
extern "C" __global__ void __launch_bounds__(256) add_partials(const __grid_constant__ Reduction p) {
  i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
  if (i >= p.total) return;
  int k = (int)(i & 7) * 4;
  i64 row = i >> 3;
  int group = (int)(row % p.groups);
  i64 at = row / p.groups, batch = at / p.length, t = at % p.length;
  int per = p.blocks / p.groups;
  const float* from = p.partial + ((batch * p.blocks + group * per) * p.length + t) * 32 + k;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int j = 0; j < per; j++) {
    float4 v = *(const float4*)(from + (i64)j * p.length * 32);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  T* to = (k < 16 ? p.dB : p.dC) + row * 16 + (k & 15);
  constexpr float restore = RESTORE * RESTORE;
  store_pair(to, sum.x * restore, sum.y * restore);
  store_pair(to + 2, sum.z * restore, sum.w * restore);
}
