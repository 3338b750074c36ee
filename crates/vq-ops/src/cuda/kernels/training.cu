// The optimizer's step over many tensors at a time, the gradient's norm, batches of images, dropout.

#define SLOTS 32

struct AdamSlot { float *param; const float* grad; float *first, *second, *average; u64 n, decays; };
struct AdamTable { AdamSlot at[SLOTS]; };
struct AdamNumbers { float grad_scale, beta1, beta2, rate, root, eps, average_keep, keep; };

// One AdamW step; blockIdx.y is the tensor. The numbers lie on the device, so that a recorded launch can be
// repeated with others. Where `scale` is given, the gradients are multiplied by what it points to as well, and
// nothing changes if that is not finite.
extern "C" __global__ void adamw(AdamTable table, const AdamNumbers* given, const float* scale) {
    AdamSlot slot = table.at[blockIdx.y];
    AdamNumbers numbers = *given;
    float keep = slot.decays ? numbers.keep : 1.f;
    float factor = numbers.grad_scale;
    if (scale) {
        if (!is_finite(*scale)) return;
        factor *= *scale;
    }
    for (u64 i = thread_number(); i < slot.n; i += thread_count()) {
        float g = slot.grad[i] * factor;
        float m = slot.first[i], v = slot.second[i];
        m += (1.f - numbers.beta1) * (g - m);
        v = numbers.beta2 * v + (1.f - numbers.beta2) * g * g;
        float p = slot.param[i] * keep - numbers.rate * m / (sqrtf(v) * numbers.root + numbers.eps);
        slot.first[i] = m;
        slot.second[i] = v;
        slot.param[i] = p;
        if (slot.average) slot.average[i] += numbers.average_keep * (p - slot.average[i]);
    }
}

struct SumSlot { const float* from; u64 n; };
struct SumTable { SumSlot at[SLOTS]; };

// Sums of squares in f64, one per block: [tensors][gridDim.x]. 256 threads.
extern "C" __global__ void squares(SumTable table, double* partial) {
    SumSlot slot = table.at[blockIdx.y];
    double sum = 0.;
    for (u64 i = thread_number(); i < slot.n; i += thread_count()) {
        sum += (double)slot.from[i] * (double)slot.from[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[(u64)blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// [the root of the sum of `n` numbers, the factor that brings it down to `limit`]; no limit where it is 0,
// and no number where the sum is none. One block of 256 threads.
extern "C" __global__ void norm_and_scale(const double* partial, float* to, u32 n, float limit) {
    double sum = 0.;
    for (u32 i = threadIdx.x; i < n; i += 256) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        float norm = (float)sqrt(sum);
        to[0] = norm;
        to[1] = !is_finite(norm) ? __uint_as_float(0x7fc00000u) : limit > 0.f && norm > limit ? limit / norm : 1.f;
    }
}

// Images [count][channels][height][width] f32 from pixels [all][channels][height][width] u8 by the tables
// [channels][256], of the given indices; mirrored left to right where the highest bit of an index is set. N pixels of
// a row at once.
template <int N>
__device__ void make_images(const unsigned char* __restrict__ pixels, const u32* __restrict__ indices,
                            const float* __restrict__ tables, float* __restrict__ to, u32 count, u32 channels,
                            u32 height, u32 width) {
    const u32 groups = width / N, plane = height * groups, size = channels * plane;
    for (u64 i = thread_number(); i < (u64)count * size; i += thread_count()) {
        const u64 image = quotient(i, size);
        const u32 place = (u32)(i - image * size), channel = place / plane, line = place / groups;
        const u32 x = (place - line * groups) * N, index = indices[image];
        const bool is_mirrored = index >> 31;
        const u64 row = ((index & 0x7fffffffu) * (u64)channels * height + line) * width;
        const Group<unsigned char, N> from =
            *(const Group<unsigned char, N>*)(pixels + row + (is_mirrored ? width - N - x : x));
        Group<float, N> values;
        #pragma unroll
        for (int j = 0; j < N; j++) values.at[j] = tables[channel * 256 + (is_mirrored ? from.at[N - 1 - j] : from.at[j])];
        ((Group<float, N>*)to)[i] = values;
    }
}

#define IMAGES(name, N)                                                                                       \
    extern "C" __global__ void name(const unsigned char* pixels, const u32* indices, const float* tables,      \
                                    float* to, u32 count, u32 channels, u32 height, u32 width) {               \
        make_images<N>(pixels, indices, tables, to, count, channels, height, width);                           \
    }
IMAGES(images, 1)
IMAGES(images_by_four, 4)

// The same hash as the CPU's.
extern "C" __global__ void dropout(const float* from, float* to, u64 n, const u32* number, u64 known, u32 threshold,
                                   float scale) {
    u64 seed = known + (number ? number[0] | (u64)number[1] << 32 : 0);
    u64 mixed = (seed ^ (seed >> 31)) * 0x9e3779b97f4a7c15ull;
    mixed = (mixed ^ (mixed >> 29)) * 0xbf58476d1ce4e5b9ull;
    u32 seed0 = (u32)mixed, seed1 = (u32)(mixed >> 32);
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        u32 hash = (u32)i ^ seed0;
        hash = (hash ^ (hash >> 16)) * 0x85ebca6bu;
        hash = (hash ^ (hash >> 13) ^ seed1) * 0xc2b2ae35u;
        hash ^= hash >> 16;
        to[i] = hash < threshold ? 0.f : from[i] * scale;
    }
}

// factor·Σ of `sum` over all threads. Each block adds up its own, and the last one the blocks. 256 threads.
__device__ inline void sum_up(double sum, double* partial, float* to, u32* counter, double factor) {
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
    if (!is_last_block(counter, gridDim.x)) return;
    sum = 0.;
    for (u32 i = threadIdx.x; i < gridDim.x; i += 256) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) to[0] = (float)(sum * factor);
}

// factor·Σ(a − b)². 256 threads.
extern "C" __global__ void squared_error(const float* a, const float* b, double* partial, float* to,
                                         u32* counter, u64 n, double factor) {
    double sum = 0.;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        float x = a[i] - b[i];
        sum += (double)x * x;
    }
    sum_up(sum, partial, to, counter, factor);
}

// Where element number i of [batch][pixels][channels] lies in [batch][channels][pixels].
__device__ inline u64 channels_first(u64 i, u32 pixels, u32 channels) {
    const u64 pixel = quotient(i, channels), image = quotient(pixel, pixels);
    return (image * channels + (i - pixel * channels)) * pixels + (pixel - image * pixels);
}

// The same of x [batch][pixels][channels] and images [batch][channels][pixels]. 256 threads.
extern "C" __global__ void image_error(const float* x, const float* images, double* partial, float* to, u32* counter,
                                       u64 n, double factor, u32 pixels, u32 channels) {
    double sum = 0.;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        float difference = x[i] - images[channels_first(i, pixels, channels)];
        sum += (double)difference * difference;
    }
    sum_up(sum, partial, to, counter, factor);
}

// factor·grad·(x − images), as x.
extern "C" __global__ void image_error_gradient(const float* x, const float* images, const float* grad, float* to,
                                                u64 n, float factor, u32 pixels, u32 channels) {
    const float scale = factor * *grad;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        to[i] = scale * (x[i] - images[channels_first(i, pixels, channels)]);
    }
}

// factor·grad·(a − b): of_a, and its opposite of_b, each where it is not null.
extern "C" __global__ void squared_error_gradient(const float* a, const float* b, const float* grad, float* of_a,
                                                  float* of_b, u64 n, float factor) {
    const float scale = factor * *grad;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        float x = scale * (a[i] - b[i]);
        if (of_a) of_a[i] = x;
        if (of_b) of_b[i] = -x;
    }
}

// factor·grad·(a − b), in n groups of N.
template <typename T, int N>
__device__ void error_gradient(const float* __restrict__ a, const float* __restrict__ b, const float* grad,
                               T* __restrict__ to, u64 n, float factor) {
    const float scale = factor * *grad;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        const Group<float, N> x = ((const Group<float, N>*)a)[i], y = ((const Group<float, N>*)b)[i];
        float values[N];
        for (int j = 0; j < N; j++) values[j] = scale * (x.at[j] - y.at[j]);
        Group<T, N> all;
        all.set(values);
        ((Group<T, N>*)to)[i] = all;
    }
}

#define ERROR_GRADIENT(T, name, N)                                                                          \
    extern "C" __global__ void error_gradient_##name(const float* a, const float* b, const float* grad, T* to, \
                                                     u64 n, float factor) {                                 \
        error_gradient<T, N>(a, b, grad, to, n, factor);                                                    \
    }
ERROR_GRADIENT(float, f32, 1)
ERROR_GRADIENT(bf16, bf16, 1)
ERROR_GRADIENT(float, f32_grouped, 8)
ERROR_GRADIENT(bf16, bf16_grouped, 8)

// wx·x + wy·y + wz·z of three numbers.
extern "C" __global__ void weighted_sum(const float* x, const float* y, const float* z, float* to, float wx,
                                        float wy, float wz) {
    if (thread_number() == 0) *to = wx * *x + wy * *y + wz * *z;
}

struct NumberTable { const float* at[SLOTS]; };

// Numbers that lie here and there, side by side. One block.
extern "C" __global__ void collect(NumberTable table, float* to, u32 n) {
    if (threadIdx.x < n) to[threadIdx.x] = *table.at[threadIdx.x];
}
