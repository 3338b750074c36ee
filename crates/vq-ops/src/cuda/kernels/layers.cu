// What surrounds a convolution: its weight's layout, bias, ReLU, residual, and their gradients.

#define PARTS 48

// One tensor of several that are side by side from `to` on. [outer][inner][taps] f32 on one side and
// [outer_packed][taps][inner_packed] on the other, with zeros where there is nothing on the first; where
// `is_plain`, f32 on both.
struct Part { const void* from; u64 to; u32 outer, inner, taps, outer_packed, inner_packed, is_plain; };
struct PartTable { Part at[PARTS]; };

// Weights [outer][inner][taps] f32 to [outer_packed][taps][inner_packed]; blockIdx.y is the tensor.
template <typename T> __device__ void pack_weights(const PartTable& table, T* to) {
    Part part = table.at[blockIdx.y];
    const float* from = (const float*)part.from;
    u32 n = part.outer_packed * part.inner_packed * part.taps;
    for (u32 i = thread_number(); i < n; i += thread_count()) {
        u32 c = i % part.inner_packed, tap = i / part.inner_packed % part.taps, o = i / part.inner_packed / part.taps;
        bool is_there = c < part.inner && o < part.outer;
        to[part.to + i] = from_float<T>(is_there ? from[(o * part.inner + c) * part.taps + tap] : 0.f);
    }
}

// Gradients [outer_packed][taps][inner_packed] to [outer][inner][taps] f32; blockIdx.y is the tensor.
template <typename T> __device__ void unpack_gradients(const PartTable& table, float* to) {
    Part part = table.at[blockIdx.y];
    u32 n = part.outer * part.inner * part.taps;
    for (u32 i = thread_number(); i < n; i += thread_count()) {
        u32 tap = i % part.taps, c = i / part.taps % part.inner, o = i / part.taps / part.inner;
        u32 at = (o * part.taps + tap) * part.inner_packed + c;
        to[part.to + i] = part.is_plain ? ((const float*)part.from)[at] : to_float(((const T*)part.from)[at]);
    }
}

// [rows][channels] f32 to [rows][packed], with zeros beyond; n elements of the latter.
template <typename T> __device__ void enter(const float* from, T* to, u64 n, u32 channels, u32 packed) {
    if (channels == packed && n % 4 == 0 && (u64)from % 16 == 0) {
        for (u64 i = 4 * thread_number(); i < n; i += 4 * thread_count()) {
            Group<float, 4> values = *(const Group<float, 4>*)(from + i);
            Group<T, 4> rounded;
            rounded.set(values.at);
            *(Group<T, 4>*)(to + i) = rounded;
        }
        return;
    }
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        u32 c = i % packed;
        to[i] = from_float<T>(c < channels ? from[i / packed * channels + c] : 0.f);
    }
}

// [rows][packed] to [rows][channels] f32; n elements of the latter.
template <typename T> __device__ void leave(const T* from, float* to, u64 n, u32 channels, u32 packed) {
    if (channels == packed && n % 4 == 0 && (u64)from % sizeof(Group<T, 4>) == 0) {
        for (u64 i = 4 * thread_number(); i < n; i += 4 * thread_count()) {
            Group<T, 4> values = *(const Group<T, 4>*)(from + i);
            Group<float, 4> exact;
            for (int j = 0; j < 4; j++) exact.at[j] = values.get(j);
            *(Group<float, 4>*)(to + i) = exact;
        }
        return;
    }
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        to[i] = to_float(from[i / channels * packed + i % channels]);
    }
}

// A convolution of images with few channels, as a product of matrices.
struct Windows {
    u32 height, width, channels;   // of the image
    u32 rows, columns;             // of the windows
    u32 kernel_height, kernel_width, stride, padding;
};

// Images [batch][height][width][channels] f32 to their windows [batch][rows][columns][kernel][channels]; n groups
// of N elements, which no window's end crosses. Zeros outside.
template <typename T, int N> __device__ void unfold(const float* from, T* to, u64 n, Windows w) {
    // What a window has of a line of pixels lies there as it does here.
    const u32 own = w.kernel_width * w.channels, line_size = w.width * w.channels, groups = w.kernel_height * own / N;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        const u64 window = quotient(i, groups), line = quotient(window, w.columns), image = quotient(line, w.rows);
        const u32 e = (u32)(i - window * groups) * N;
        const u32 column = (u32)(window - line * w.columns), row = (u32)(line - image * w.rows);
        const u32 ky = e / own, left = (column * w.stride - w.padding) * w.channels;
        u32 rest = e - ky * own, y = row * w.stride + ky - w.padding;
        const float* pixels = from + image * w.height * line_size;
        float values[N];
        #pragma unroll
        for (int j = 0; j < N; j++) {
            // Below 0 it wraps around and is outside all the same. The load does not depend on it.
            const bool is_inside = y < w.height && left + rest < line_size;
            const float value = pixels[is_inside ? y * line_size + left + rest : 0];
            values[j] = is_inside ? value : 0.f;
            if (++rest == own) { rest = 0; y++; }
        }
        Group<T, N> all;
        all.set(values);
        ((Group<T, N>*)to)[i] = all;
    }
}

// The other way: the sum of what windows say of each pixel, and the bias where it is given; n pixels.
template <typename T> __device__ void fold(const T* from, const float* bias, float* to, u64 n, Windows w) {
    const u32 size = w.kernel_height * w.kernel_width * w.channels;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        const u64 line = quotient(i, w.width), image = quotient(line, w.height);
        const u32 x = (u32)(i - line * w.width) + w.padding, y = (u32)(line - image * w.height) + w.padding;
        const T* windows = from + image * w.rows * w.columns * size;
        const u32 last_row = y / w.stride, last_column = x / w.stride;
        for (u32 c = 0; c < w.channels; c++) {
            float sum = bias ? bias[c] : 0.f;
            for (u32 row = last_row, ky = y - last_row * w.stride; ky < w.kernel_height; row--, ky += w.stride) {
                // The row before the first wraps around.
                if (row >= w.rows) continue;
                u32 column = last_column, kx = x - last_column * w.stride;
                for (; kx < w.kernel_width; column--, kx += w.stride) {
                    if (column >= w.columns) continue;
                    const u32 window = row * w.columns + column, tap = ky * w.kernel_width + kx;
                    sum += to_float(windows[window * size + tap * w.channels + c]);
                }
            }
            to[i * w.channels + c] = sum;
        }
    }
}

// plain = y + bias + residual and rectified = relu(plain), each where it is not null. n elements in groups of
// N, the last axis of `channels`, which no group crosses; the first `biases` of them have a bias.
template <typename T, int N>
__device__ void finish(const T* __restrict__ y, const float* __restrict__ bias, const T* __restrict__ residual,
                       T* __restrict__ plain, T* __restrict__ rectified, u64 n, u32 channels, u32 biases) {
    typedef Group<T, N> Elements;
    const u64 step = N * thread_count();
    float shift[N] = {};
    auto look_up = [&](u64 i) {
        const u32 channel = (u32)(i - quotient(i, channels) * channels);
        for (int j = 0; j < N; j++) shift[j] = channel + j < biases ? bias[channel + j] : 0.f;
    };
    auto put = [&](u64 i, const Elements& from, const Elements& other) {
        float values[N], above[N];
        for (int j = 0; j < N; j++) {
            values[j] = from.get(j) + shift[j];
            if (residual) values[j] += other.get(j);
            above[j] = relu(values[j]);
        }
        Elements to;
        // Counted in groups, or nvcc would not see that it can store one at once.
        if (plain) { to.set(values); ((Elements*)plain)[i / N] = to; }
        if (rectified) { to.set(above); ((Elements*)rectified)[i / N] = to; }
    };
    // Whether a thread has the same channels in every turn. Two turns at once, so that one's loads need not wait
    // for the other's stores.
    const bool is_steady = !bias || step == quotient(step, channels) * channels;
    for (u64 i = N * thread_number(); i < n; i += 2 * step) {
        const u64 second = i + step;
        Elements from = *(const Elements*)(y + i), other = from, next = from, next_other = from;
        if (second < n) next = *(const Elements*)(y + second);
        if (residual) other = *(const Elements*)(residual + i);
        if (residual && second < n) next_other = *(const Elements*)(residual + second);
        if (bias && (!is_steady || i < step)) look_up(i);
        put(i, from, other);
        if (second >= n) break;
        if (!is_steady) look_up(second);
        put(second, next, next_other);
    }
}

#define SUM_THREADS 512

// Where `gate` is given: to = grad where gate is above 0 (or NaN), else 0; plus `more` where that is not null.
// The sums of the columns of `to`, or without a gate of `grad`, [rows][columns]: each block adds up some rows,
// and the last one the blocks, always in the same order. blockIdx.y: 256 groups of N columns. SUM_THREADS
// threads. partial [gridDim.x][columns], a counter per blockIdx.y.
template <typename T, int N>
__device__ void sum_columns(const T* __restrict__ grad, const T* __restrict__ gate, const T* __restrict__ more,
                            T* __restrict__ to, float* partial, float* sums, u32* counters, u64 rows, u32 columns) {
    typedef Group<T, N> Elements;
    // Rows at once, so that their loads are under way together.
    constexpr int TURNS = N == 1 ? 4 : 2;
    __shared__ float shared[SUM_THREADS * N];
    const u32 first = blockIdx.y * 256, all = columns / N;
    const u32 width = all - first < 256 ? all - first : 256, height = SUM_THREADS / width;
    const u32 lane = threadIdx.x % width, row = threadIdx.x / width;
    const u64 step = (u64)gridDim.x * height;
    float own[N] = {};
    for (u64 r = (u64)blockIdx.x * height + row; row < height && r < rows; r += TURNS * step) {
        Elements values[TURNS], gates[TURNS], others[TURNS];
        #pragma unroll
        for (int t = 0; t < TURNS; t++) {
            const u64 here = r + t * step < rows ? r + t * step : r;
            const u64 at = here * all + first + lane;
            values[t] = ((const Elements*)grad)[at];
            if (gate) gates[t] = ((const Elements*)gate)[at];
            if (more) others[t] = ((const Elements*)more)[at];
        }
        #pragma unroll
        for (int t = 0; t < TURNS; t++) {
            if (r + t * step >= rows) break;
            if (gate) {
                float masked[N];
                for (int j = 0; j < N; j++) {
                    masked[j] = gates[t].get(j) <= 0.f ? 0.f : values[t].get(j);
                    if (more) masked[j] += others[t].get(j);
                }
                values[t].set(masked);
                ((Elements*)to)[(r + t * step) * all + first + lane] = values[t];
            }
            for (int j = 0; j < N; j++) own[j] += values[t].get(j);
        }
    }
    for (int j = 0; j < N; j++) shared[threadIdx.x * N + j] = own[j];
    __syncthreads();
    const u32 here = width * N, start = first * N;
    for (u32 c = threadIdx.x; c < here; c += SUM_THREADS) {
        float sum = 0.f;
        for (u32 r = 0; r < height; r++) sum += shared[r * here + c];
        partial[(u64)blockIdx.x * columns + start + c] = sum;
    }
    if (!is_last_block(counters + blockIdx.y, gridDim.x)) return;
    const u32 parts = here < SUM_THREADS ? SUM_THREADS / here : 1, part = threadIdx.x / here;
    for (u32 c = threadIdx.x % here; c < here; c += SUM_THREADS) {
        float sum = 0.f;
        // Sixteen at once, or each would wait for the one before.
        for (u32 b = part; part < parts && b < gridDim.x; b += 16 * parts) {
            float values[16];
            #pragma unroll
            for (u32 i = 0; i < 16; i++) {
                u32 at = b + i * parts;
                float value = partial[(u64)(at < gridDim.x ? at : b) * columns + start + c];
                values[i] = at < gridDim.x ? value : 0.f;
            }
            #pragma unroll
            for (u32 i = 0; i < 16; i++) sum += values[i];
        }
        if (parts > 1) shared[threadIdx.x] = sum;
        // Those beyond the last column have added nothing.
        else if (part == 0) sums[start + c] = sum;
    }
    if (parts == 1) return;
    __syncthreads();
    if (threadIdx.x < here) {
        float sum = 0.f;
        for (u32 p = 0; p < parts; p++) sum += shared[p * here + threadIdx.x];
        sums[start + threadIdx.x] = sum;
    }
}

// One of several maps side by side: each of its pixels, of `own` elements, counts times × times there, where its
// `channels` start at `first` of a pixel's `all`.
struct Place { u32 height, width, times, channels, own, first, all; };

// A map [batch][height][width][own] to where it lies among others; n groups of N elements, which are of one pixel.
template <typename F, typename T, int N> __device__ void join_map(const F* from, T* to, u64 n, Place p) {
    const u32 groups = p.channels / N, width = p.width * p.times, height = p.height * p.times;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        const u64 pixel = quotient(i, groups);
        const u32 c = (u32)(i - pixel * groups) * N;
        u64 source = pixel;
        if (p.times > 1) {
            const u64 row = quotient(pixel, width), image = quotient(row, height);
            const u32 x = (u32)(pixel - row * width), y = (u32)(row - image * height);
            source = (image * p.height + y / p.times) * p.width + x / p.times;
        }
        Group<F, N> values = *(const Group<F, N>*)(from + source * p.own + c);
        float exact[N];
        for (int j = 0; j < N; j++) exact[j] = values.get(j);
        Group<T, N> placed;
        placed.set(exact);
        // Counted in groups, or nvcc would not see that it can store one at once.
        ((Group<T, N>*)to)[(pixel * p.all + p.first + c) / N] = placed;
    }
}

// The other way: sums, and zeros beyond the channels; n groups of N elements of `to`.
template <typename F, typename T, int N> __device__ void map_part(const F* from, T* to, u64 n, Place p) {
    const u32 groups = p.own / N, width = p.width * p.times;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        const u64 pixel = quotient(i, groups), row = quotient(pixel, p.width);
        const u32 c = (u32)(i - pixel * groups) * N, x = (u32)(pixel - row * p.width);
        float sums[N] = {};
        for (u32 tap = 0; c < p.channels && tap < p.times * p.times; tap++) {
            const u64 source = (row * p.times + tap / p.times) * width + x * p.times + tap % p.times;
            Group<F, N> values = *(const Group<F, N>*)(from + source * p.all + p.first + c);
            for (int j = 0; j < N; j++) sums[j] += values.get(j);
        }
        Group<T, N> all;
        all.set(sums);
        *(Group<T, N>*)(to + i * N) = all;
    }
}

// [batch][rows][columns] to [batch][columns][rows].
extern "C" __global__ void swap_axes(const float* from, float* to, u64 n, u32 rows, u32 columns) {
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        const u64 line = quotient(i, rows), b = quotient(line, columns);
        const u32 r = (u32)(i - line * rows), c = (u32)(line - b * columns);
        to[i] = from[(b * rows + r) * columns + c];
    }
}

#define SUMS(T, name, N)                                                                                  \
    extern "C" __global__ void finish_##name(const T* y, const float* bias, const T* residual, T* plain,   \
                                             T* rectified, u64 n, u32 channels, u32 biases) {             \
        finish<T, N>(y, bias, residual, plain, rectified, n, channels, biases);                            \
    }                                                                                                      \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS, 2)                                           \
        sum_columns_##name(const T* grad, const T* gate, const T* more, T* to, float* partial, float* sums, \
                           u32* counters, u64 rows, u32 columns) {                                         \
        sum_columns<T, N>(grad, gate, more, to, partial, sums, counters, rows, columns);                   \
    }
#define LAYERS(T, name)                                                                                    \
    extern "C" __global__ void pack_weights_##name(PartTable table, T* to) { pack_weights<T>(table, to); } \
    extern "C" __global__ void unpack_gradients_##name(PartTable table, float* to) {                       \
        unpack_gradients<T>(table, to);                                                                    \
    }                                                                                                      \
    extern "C" __global__ void enter_##name(const float* from, T* to, u64 n, u32 channels, u32 packed) {   \
        enter<T>(from, to, n, channels, packed);                                                           \
    }                                                                                                      \
    extern "C" __global__ void unfold_##name(const float* from, T* to, u64 n, Windows windows) {           \
        unfold<T, GROUP<T>>(from, to, n, windows);                                                         \
    }                                                                                                      \
    extern "C" __global__ void fold_##name(const T* from, const float* bias, float* to, u64 n,             \
                                           Windows windows) {                                              \
        fold<T>(from, bias, to, n, windows);                                                               \
    }                                                                                                      \
    extern "C" __global__ void leave_##name(const T* from, float* to, u64 n, u32 channels, u32 packed) {   \
        leave<T>(from, to, n, channels, packed);                                                           \
    }
LAYERS(float, f32)
LAYERS(bf16, bf16)
SUMS(float, f32, 1)
SUMS(bf16, bf16, 1)
SUMS(float, f32_grouped, GROUP<float>)
SUMS(bf16, bf16_grouped, GROUP<bf16>)

#define JOINED(F, T, name, N)                                                                              \
    extern "C" __global__ void join_map_##name(const F* from, T* to, u64 n, Place place) {                \
        join_map<F, T, N>(from, to, n, place);                                                            \
    }                                                                                                      \
    extern "C" __global__ void map_part_##name(const F* from, T* to, u64 n, Place place) {                \
        map_part<F, T, N>(from, to, n, place);                                                            \
    }
JOINED(float, float, f32_f32, 1)
JOINED(float, bf16, f32_bf16, 1)
JOINED(bf16, float, bf16_f32, 1)
JOINED(bf16, bf16, bf16_bf16, 1)
JOINED(float, float, f32_f32_grouped, 8)
JOINED(float, bf16, f32_bf16_grouped, 8)
JOINED(bf16, float, bf16_f32_grouped, 8)
JOINED(bf16, bf16, bf16_bf16_grouped, 8)
