// What surrounds a convolution: its weight's layout, bias, ReLU, residual, and their gradients.

// [outer][inner][taps] f32 to [outer][taps][inner].
template <typename T>
__device__ void pack_weight(const float* from, T* to, u32 outer, u32 inner, u32 taps) {
    u64 n = (u64)outer * inner * taps;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        u32 c = i % inner, tap = i / inner % taps;
        u64 o = i / inner / taps;
        to[i] = from_float<T>(from[(o * inner + c) * taps + tap]);
    }
}

// [outer][taps][inner] to [outer][inner][taps] f32.
template <typename T>
__device__ void unpack_weight(const T* from, float* to, u32 outer, u32 inner, u32 taps) {
    u64 n = (u64)outer * inner * taps;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        u32 tap = i % taps, c = i / taps % inner;
        u64 o = i / taps / inner;
        to[i] = to_float(from[(o * taps + tap) * inner + c]);
    }
}

template <typename T, int N>
__device__ void finish_at(u64 i, const T* y, const float* bias, const T* residual, T* plain, T* rectified,
                          u32 channels) {
    for (int j = 0; j < N; j++) {
        float value = to_float(y[j]);
        if (bias) value += bias[i % channels + j];
        if (residual) value += to_float(residual[j]);
        T rounded = from_float<T>(value);
        if (plain) plain[j] = rounded;
        if (rectified) rectified[j] = from_float<T>(relu(to_float(rounded)));
    }
}

// plain = y + bias + residual and rectified = relu(plain), each where it is not null. n elements, the last
// axis of `channels`. Four at a time where they do not cross a row.
template <typename T>
__device__ void finish(const T* y, const float* bias, const T* residual, T* plain, T* rectified, u64 n,
                       u32 channels, bool by_four) {
    if (!by_four) {
        for (u64 i = thread_number(); i < n; i += thread_count()) {
            finish_at<T, 1>(i, y + i, bias, residual ? residual + i : 0, plain ? plain + i : 0,
                            rectified ? rectified + i : 0, channels);
        }
        return;
    }
    for (u64 i = 4 * thread_number(); i < n; i += 4 * thread_count()) {
        Four<T> from = *(const Four<T>*)(y + i), other = from, to, to_rectified;
        if (residual) other = *(const Four<T>*)(residual + i);
        finish_at<T, 4>(i, from.at, bias, residual ? other.at : 0, to.at, to_rectified.at, channels);
        if (plain) *(Four<T>*)(plain + i) = to;
        if (rectified) *(Four<T>*)(rectified + i) = to_rectified;
    }
}

// to = grad where gate is above 0 (or NaN), else 0; plus `more` where it is not null.
template <typename T>
__device__ void mask(const T* grad, const T* gate, const T* more, T* to, u64 n) {
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        float value = to_float(gate[i]) <= 0.f ? 0.f : to_float(grad[i]);
        if (more) value += to_float(more[i]);
        to[i] = from_float<T>(value);
    }
}

// Sums of the columns of [rows][columns], one partial result per block of rows: [gridDim.y][columns].
// Threads: 32 columns by 8 rows.
template <typename T>
__device__ void column_sums(const T* from, float* partial, u64 rows, u32 columns) {
    __shared__ float sums[8][32];
    u32 lane = threadIdx.x % 32, row = threadIdx.x / 32;
    u32 column = blockIdx.x * 32 + lane;
    float sum = 0.f;
    if (column < columns) {
        u64 each = (rows + gridDim.y - 1) / gridDim.y;
        u64 first = each * blockIdx.y, end = first + each < rows ? first + each : rows;
        for (u64 r = first + row; r < end; r += 8) sum += to_float(from[r * columns + column]);
    }
    sums[row][lane] = sum;
    __syncthreads();
    if (row == 0 && column < columns) {
        for (u32 r = 1; r < 8; r++) sum += sums[r][lane];
        partial[(u64)blockIdx.y * columns + column] = sum;
    }
}

extern "C" __global__ void add_rows_f32(const float* partial, float* to, u32 rows, u32 columns) {
    u32 column = thread_number();
    if (column >= columns) return;
    float sum = 0.f;
    for (u32 r = 0; r < rows; r++) sum += partial[(u64)r * columns + column];
    to[column] = sum;
}

#define LAYERS(T, name)                                                                                    \
    extern "C" __global__ void pack_weight_##name(const float* from, T* to, u32 outer, u32 inner, u32 taps) { \
        pack_weight<T>(from, to, outer, inner, taps);                                                      \
    }                                                                                                      \
    extern "C" __global__ void unpack_weight_##name(const T* from, float* to, u32 outer, u32 inner, u32 taps) { \
        unpack_weight<T>(from, to, outer, inner, taps);                                                    \
    }                                                                                                      \
    extern "C" __global__ void finish_##name(const T* y, const float* bias, const T* residual, T* plain,   \
                                             T* rectified, u64 n, u32 channels, u32 by_four) {             \
        finish<T>(y, bias, residual, plain, rectified, n, channels, by_four);                              \
    }                                                                                                      \
    extern "C" __global__ void mask_##name(const T* grad, const T* gate, const T* more, T* to, u64 n) {    \
        mask<T>(grad, gate, more, to, n);                                                                  \
    }                                                                                                      \
    extern "C" __global__ void column_sums_##name(const T* from, float* partial, u64 rows, u32 columns) {  \
        column_sums<T>(from, partial, rows, columns);                                                      \
    }
LAYERS(float, f32)
LAYERS(bf16, bf16)
