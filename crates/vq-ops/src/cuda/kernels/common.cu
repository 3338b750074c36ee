// What all kernels share. The files of this folder are compiled one after the other as one source, by nvrtc
// at run time (so no header of the CUDA toolkit is needed), by nvcc in a check, and, with a few macros, by a
// C++ compiler in a test that runs every thread on the CPU.

typedef unsigned short bf16;          // bits
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float((u32)x << 16); }

// Ties to even; a NaN stays one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ inline u32 round_two(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ inline bf16 round_one(float x) { return (bf16)round_two(x, 0.f); }
#else
__device__ inline bf16 round_one(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bf16)((bits >> 16) | 0x40u);
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
__device__ inline u32 round_two(float low, float high) { return round_one(low) | (u32)round_one(high) << 16; }
#endif

template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) { return round_one(x); }

// Elements that are read and written at once: 16 bytes, or one by one.
template <typename T, int N> struct alignas(N * sizeof(T)) Group {
    T at[N];
    __device__ float get(int i) const { return to_float(at[i]); }
    __device__ void set(const float (&values)[N]) {
        for (int i = 0; i < N; i++) at[i] = from_float<T>(values[i]);
    }
};
// Two in a word.
template <int N> struct alignas(N * sizeof(bf16)) Group<bf16, N> {
    u32 at[N / 2];
    __device__ float get(int i) const { return __uint_as_float(i % 2 ? at[i / 2] & 0xffff0000u : at[i / 2] << 16); }
    __device__ void set(const float (&values)[N]) {
        for (int i = 0; i < N; i += 2) at[i / 2] = round_two(values[i], values[i + 1]);
    }
};
template <> struct Group<bf16, 1> {
    bf16 at[1];
    __device__ float get(int) const { return to_float(at[0]); }
    __device__ void set(const float (&values)[1]) { at[0] = round_one(values[0]); }
};
template <typename T> constexpr int GROUP = 16 / sizeof(T);

// NaN goes through, as PyTorch's does.
__device__ inline float relu(float x) { return x <= 0.f ? 0.f : x; }

__device__ inline bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// In 32 bits where they are enough: in 64 it takes many times as long.
__device__ inline u64 quotient(u64 a, u32 b) { return a >> 32 ? a / b : (u32)a / b; }

__device__ inline u64 thread_number() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline u64 thread_count() { return (u64)gridDim.x * blockDim.x; }

// Whether this block is the last of `blocks` to come here, so that it sees what all have written before. The
// counter is 0 before and after. All threads of the block.
__device__ inline bool is_last_block(u32* counter, u32 blocks) {
    __shared__ u32 place;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        place = atomicAdd(counter, 1u);
        if (place == blocks - 1) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    return place == blocks - 1;
}

// Σ of `sum` over a block of 256 threads, for all of them.
__device__ inline double block_sum(double sum) {
    __shared__ double sums[256];
    sums[threadIdx.x] = sum;
    for (u32 width = 128; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    }
    __syncthreads();
    return sums[0];
}
