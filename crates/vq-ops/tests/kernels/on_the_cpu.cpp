// Runs the CUDA kernels on the CPU and compares them with loops. Every CUDA thread of a block is a context of
// its own, which runs up to the next barrier before the next one does, forwards and backwards in turn, so that
// a missing barrier shows. Built and started by ../kernels.rs.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads, blocks)

struct Index { unsigned x = 0, y = 0, z = 0; };
static Index threadIdx, blockIdx, blockDim, gridDim;
static ucontext_t scheduler, contexts[512];
static char stacks[512][64 << 10];
static bool is_done[512];
static void __syncthreads() { unsigned t = threadIdx.x; swapcontext(&contexts[t], &scheduler); }
static float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
// One thread runs at a time.
static void __threadfence() {}
template <typename T> static T atomicAdd(T* to, T more) { T old = *to; *to += more; return old; }
template <typename T> static T atomicMax(T* to, T other) { T old = *to; if (other > old) *to = other; return old; }

#include "../../src/cuda/kernels/common.cu"
#include "../../src/cuda/kernels/layers.cu"
#include "../../src/cuda/kernels/codebook.cu"
#include "../../src/cuda/kernels/training.cu"
#include "../../src/cuda/kernels/pixels.cu"

static std::function<void()> running;
static void run_thread() {
    unsigned t = threadIdx.x;
    running();
    is_done[t] = true;
}

static void launch(Index grid, unsigned threads, std::function<void()> kernel) {
    gridDim = grid; blockDim = {threads, 1, 1}; running = kernel;
    for (unsigned block = 0; block < grid.x * grid.y; block++) {
        blockIdx = {block % grid.x, block / grid.x, 0};
        for (unsigned t = 0; t < threads; t++) {
            is_done[t] = false;
            getcontext(&contexts[t]);
            contexts[t].uc_stack.ss_sp = stacks[t];
            contexts[t].uc_stack.ss_size = sizeof stacks[t];
            contexts[t].uc_link = &scheduler;
            makecontext(&contexts[t], run_thread, 0);
        }
        bool is_forward = true;
        for (unsigned left = threads; left > 0; is_forward = !is_forward)
            for (unsigned i = 0; i < threads; i++) {
                unsigned t = is_forward ? i : threads - 1 - i;
                if (is_done[t]) continue;
                threadIdx = {t, 0, 0};
                swapcontext(&scheduler, &contexts[t]);
                left -= is_done[t];
            }
    }
}

static std::mt19937 generator(7);
static std::vector<float> noise(size_t n, float scale = 1.f) {
    std::vector<float> values(n);
    for (auto& v : values) v = scale * (2.f * (generator() >> 8) / float(1 << 24) - 1.f);
    return values;
}
static void check(bool holds, const char* what) {
    if (!holds) { std::printf("failed: %s\n", what); std::exit(1); }
}
static bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }
static bool near(double a, double b, double allowed) { return std::fabs(a - b) <= allowed; }
template <typename T> static std::vector<T> rounded(const std::vector<float>& from) {
    std::vector<T> to;
    for (float x : from) to.push_back(from_float<T>(x));
    return to;
}

static void conversions() {
    check(to_float(from_float<bf16>(1.00390625f)) == 1.f, "bf16 takes the even one of two");
    check(to_float(from_float<bf16>(1.01171875f)) == 1.015625f, "bf16 takes the even one of two, up");
    check(std::isnan(to_float(from_float<bf16>(__uint_as_float(0x7f800001u)))), "bf16 keeps NaN");
    check(std::isinf(to_float(from_float<bf16>(INFINITY))), "bf16 keeps infinity");
}

template <typename T> static void weights() {
    // Two weights, the second with room for more channels, and, going back, something that is f32 already.
    const u32 outer[3] = {5, 2, 7}, inner[3] = {3, 70, 1}, taps[3] = {9, 1, 1};
    const u32 outer_packed[3] = {5, 4, 7}, inner_packed[3] = {3, 72, 1};
    u64 first[3] = {8, 160, 0}, flat[3] = {0, 135, 275};
    std::vector<std::vector<float>> w;
    PartTable table = {}, back_table = {};
    std::vector<T> packed(600);
    for (int i = 0; i < 3; i++) {
        w.push_back(noise(outer[i] * inner[i] * taps[i]));
        table.at[i] = {w[i].data(), first[i], outer[i], inner[i], taps[i], outer_packed[i], inner_packed[i], 0};
        const void* from = i < 2 ? (const void*)(packed.data() + first[i]) : w[2].data();
        back_table.at[i] = {from, flat[i], outer[i], inner[i], taps[i], outer_packed[i], inner_packed[i], i == 2};
    }
    std::vector<float> back(282, NAN);
    launch({2, 2, 1}, 32, [&] { pack_weights<T>(table, packed.data()); });
    for (int i = 0; i < 2; i++)
        for (u32 o = 0; o < outer_packed[i]; o++)
            for (u32 c = 0; c < inner_packed[i]; c++)
                for (u32 t = 0; t < taps[i]; t++) {
                    bool is_there = o < outer[i] && c < inner[i];
                    check(packed[first[i] + (o * taps[i] + t) * inner_packed[i] + c] ==
                              from_float<T>(is_there ? w[i][(o * inner[i] + c) * taps[i] + t] : 0.f), "pack_weights");
                }
    launch({2, 3, 1}, 32, [&] { unpack_gradients<T>(back_table, back.data()); });
    for (int i = 0; i < 3; i++)
        for (size_t j = 0; j < w[i].size(); j++)
            check(back[flat[i] + j] == (i == 2 ? w[i][j] : to_float(from_float<T>(w[i][j]))), "unpack_gradients");
    auto x = noise(7 * 3);
    std::vector<T> entered(7 * 8);
    std::vector<float> left(7 * 3);
    launch({1, 1, 1}, 32, [&] { enter<T>(x.data(), entered.data(), 7 * 8, 3, 8); });
    launch({1, 1, 1}, 32, [&] { leave<T>(entered.data(), left.data(), 7 * 3, 3, 8); });
    for (u32 r = 0; r < 7; r++)
        for (u32 c = 0; c < 8; c++) {
            check(entered[r * 8 + c] == from_float<T>(c < 3 ? x[r * 3 + c] : 0.f), "enter");
            if (c < 3) check(left[r * 3 + c] == to_float(entered[r * 8 + c]), "leave");
        }
}

template <typename T> struct Padded {
    std::vector<T> memory;
    T* at;
    Padded(const std::vector<T>& from) : memory(from.size() + 16) {
        at = (T*)(((uintptr_t)memory.data() + 15) / 16 * 16);
        std::copy(from.begin(), from.end(), at);
    }
};

template <typename T, int N> static void finishing(u32 channels) {
    const u32 rows = 7, n = rows * channels;
    auto values = noise(n);
    values[3] = NAN;
    Padded<T> y(rounded<T>(values)), residual(rounded<T>(noise(n)));
    auto bias = noise(channels);
    for (int which = 0; which < 8; which++) {
        const float* b = which & 1 ? bias.data() : nullptr;
        const T* r = which & 2 ? residual.at : nullptr;
        Padded<T> plain{std::vector<T>(n)}, rectified{std::vector<T>(n)};
        T* p = which & 4 ? plain.at : nullptr;
        launch({3, 1, 1}, 32, [&] { finish<T, N>(y.at, b, r, p, rectified.at, n, channels, channels - 1); });
        for (u32 i = 0; i < n; i++) {
            float sum = to_float(y.at[i]);
            if (b && i % channels + 1 < channels) sum += bias[i % channels];
            if (r) sum += to_float(residual.at[i]);
            T expected = from_float<T>(sum);
            if (p) check(same(to_float(plain.at[i]), to_float(expected)), "finish");
            check(same(to_float(rectified.at[i]), relu(to_float(expected))), "finish, rectified");
        }
    }
}

// Sums of columns, of gradients that are masked on the way or not.
template <typename T, int N> static void sums(u32 rows, u32 columns, u32 blocks) {
    const u32 n = rows * columns, across = (columns / N + 255) / 256;
    Padded<T> grad(rounded<T>(noise(n))), more(rounded<T>(noise(n)));
    auto gates = noise(n);
    gates[0] = NAN; gates[n - 1] = 0.f;
    Padded<T> gate(rounded<T>(gates));
    for (int which = 0; which < 3; which++) {
        std::vector<float> partial(blocks * columns, NAN), to(columns, NAN);
        std::vector<u32> counters(across, 0);
        Padded<T> masked{std::vector<T>(n)};
        launch({blocks, across, 1}, SUM_THREADS, [&] {
            sum_columns<T, N>(grad.at, which > 0 ? gate.at : nullptr, which > 1 ? more.at : nullptr, masked.at,
                              partial.data(), to.data(), counters.data(), rows, columns);
        });
        for (u32 counter : counters) check(counter == 0, "sum_columns, counters");
        for (u32 c = 0; c < columns; c++) {
            double sum = 0;
            for (u32 r = 0; r < rows; r++) {
                u32 i = r * columns + c;
                float value = to_float(grad.at[i]);
                if (which > 0) {
                    if (to_float(gate.at[i]) <= 0.f) value = 0.f;
                    if (which > 1) value += to_float(more.at[i]);
                    check(masked.at[i] == from_float<T>(value), "sum_columns, masked");
                    value = to_float(masked.at[i]);
                }
                sum += value;
            }
            check(near(to[c], sum, 1e-6 * rows), "sum_columns");
        }
    }
}

template <typename T, int N> static void folding(u32 channels, u32 kernel, u32 stride, u32 padding) {
    const u32 batch = 2, height = 6, width = 8;
    const u32 rows = (height + 2 * padding - kernel) / stride + 1, columns = (width + 2 * padding - kernel) / stride + 1;
    Windows w = {height, width, channels, rows, columns, kernel, kernel, stride, padding};
    auto x = noise(batch * height * width * channels), bias = noise(channels);
    const u32 size = kernel * kernel * channels, n = batch * rows * columns * size;
    Padded<T> windows{std::vector<T>(n)};
    launch({2, 1, 1}, 32, [&] { unfold<T, N>(x.data(), windows.at, n / N, w); });
    std::vector<double> back(x.size());
    for (u32 b = 0; b < batch; b++)
        for (u32 r = 0; r < rows; r++)
            for (u32 q = 0; q < columns; q++)
                for (u32 ky = 0; ky < kernel; ky++)
                    for (u32 kx = 0; kx < kernel; kx++)
                        for (u32 c = 0; c < channels; c++) {
                            int y = int(r * stride + ky) - int(padding), z = int(q * stride + kx) - int(padding);
                            bool inside = y >= 0 && y < int(height) && z >= 0 && z < int(width);
                            u32 at = ((b * height + (inside ? y : 0)) * width + (inside ? z : 0)) * channels + c;
                            u32 of = (((b * rows + r) * columns + q) * kernel * kernel + ky * kernel + kx) * channels + c;
                            check(windows.at[of] == from_float<T>(inside ? x[at] : 0.f), "unfold");
                            if (inside) back[at] += to_float(windows.at[of]);
                        }
    std::vector<float> to(x.size());
    for (bool has_bias : {false, true}) {
        const float* b = has_bias ? bias.data() : nullptr;
        launch({2, 1, 1}, 32, [&] { fold<T>(windows.at, b, to.data(), batch * height * width, w); });
        for (size_t i = 0; i < to.size(); i++) {
            check(near(to[i], back[i] + (has_bias ? bias[i % channels] : 0.f), 1e-5), "fold");
        }
    }
}

static void axes() {
    const u32 batch = 2, rows = 35, columns = 3;
    auto from = noise(batch * rows * columns);
    std::vector<float> to(from.size());
    launch({2, 1, 1}, 32, [&] { swap_axes(from.data(), to.data(), from.size(), rows, columns); });
    for (u32 b = 0; b < batch; b++)
        for (u32 r = 0; r < rows; r++)
            for (u32 c = 0; c < columns; c++)
                check(to[(b * columns + c) * rows + r] == from[(b * rows + r) * columns + c], "swap_axes");
}

// Two maps side by side, the second's pixels twice in both directions, in pixels of `all`.
template <typename F, typename T, int N> static void joining(u32 channels, u32 own, u32 other, u32 all) {
    const u32 batch = 2, height = 4, width = 6;
    auto large = rounded<F>(noise(batch * height * width * own));
    auto small = rounded<F>(noise(batch * height * width / 4 * other));
    std::vector<T> to(batch * height * width * all, from_float<T>(7.f));
    Place first = {height, width, 1, channels, own, 0, all};
    Place second = {height / 2, width / 2, 2, other, other, channels, all};
    const u64 pixels = batch * height * width;
    launch({2, 1, 1}, 32, [&] { join_map<F, T, N>(large.data(), to.data(), pixels * channels / N, first); });
    launch({2, 1, 1}, 32, [&] { join_map<F, T, N>(small.data(), to.data(), pixels * other / N, second); });
    std::vector<double> sums(small.size());
    for (u32 i = 0; i < pixels; i++) {
        const u32 x = i % width, y = i / width % height, b = i / width / height;
        const u32 j = (b * height / 2 + y / 2) * width / 2 + x / 2;
        for (u32 c = 0; c < all; c++) {
            float expected = 7.f;
            if (c < channels) expected = to_float(large[i * own + c]);
            else if (c < channels + other) expected = to_float(small[j * other + c - channels]);
            check(to_float(to[i * all + c]) == to_float(from_float<T>(expected)), "join_map");
            if (c >= channels && c < channels + other) sums[j * other + c - channels] += to_float(to[i * all + c]);
        }
    }
    std::vector<F> of_large(large.size()), of_small(small.size());
    launch({2, 1, 1}, 32, [&] { map_part<T, F, N>(to.data(), of_large.data(), large.size() / N, first); });
    launch({2, 1, 1}, 32, [&] { map_part<T, F, N>(to.data(), of_small.data(), small.size() / N, second); });
    for (u32 i = 0; i < pixels; i++)
        for (u32 c = 0; c < own; c++)
            check(to_float(of_large[i * own + c]) == to_float(from_float<F>(c < channels ? to_float(to[i * all + c]) : 0.f)),
                  "map_part");
    for (size_t i = 0; i < small.size(); i++) check(near(to_float(of_small[i]), sums[i], 0.02), "map_part, sums");
}

static void errors(u32 n, u32 blocks) {
    auto a = noise(n), b = noise(n);
    std::vector<double> partial(blocks);
    std::vector<float> of_a(n), of_b(n);
    float to, grad = 0.5f;
    u32 counter = 0;
    launch({blocks, 1, 1}, 256, [&] { squared_error(a.data(), b.data(), partial.data(), &to, &counter, n, 3. / n); });
    double sum = 0;
    for (u32 i = 0; i < n; i++) sum += std::pow((double)a[i] - b[i], 2);
    check(near(to, 3 * sum / n, 1e-6), "squared_error");
    launch({2, 1, 1}, 32, [&] { squared_error_gradient(a.data(), b.data(), &grad, of_a.data(), of_b.data(), n, 4.f); });
    for (u32 i = 0; i < n; i++) {
        check(near(of_a[i], 2 * (a[i] - b[i]), 1e-6) && of_b[i] == -of_a[i], "squared_error_gradient");
    }
    const u32 groups = n / 8;
    Padded<float> x(a), y(b), gradients{std::vector<float>(n)};
    Padded<bf16> rounded_gradients{std::vector<bf16>(n)};
    launch({2, 1, 1}, 32, [&] { error_gradient<float, 8>(x.at, y.at, &grad, gradients.at, groups, 4.f); });
    launch({2, 1, 1}, 32, [&] { error_gradient<bf16, 8>(x.at, y.at, &grad, rounded_gradients.at, groups, 4.f); });
    for (u32 i = 0; i < 8 * groups; i++) {
        check(gradients.at[i] == of_a[i] && rounded_gradients.at[i] == from_float<bf16>(of_a[i]), "error_gradient");
    }
    launch({1, 1, 1}, 32, [&] { weighted_sum(&a[0], &b[0], &grad, &to, 2, 3, 4); });
    check(near(to, 2 * a[0] + 3 * b[0] + 2, 1e-5), "weighted_sum");
    NumberTable table = {};
    table.at[0] = &grad; table.at[1] = &b[0];
    float both[2];
    launch({1, 1, 1}, 32, [&] { collect(table, both, 2); });
    check(both[0] == grad && both[1] == b[0], "collect");
}

static void errors_of_images(u32 batch, u32 pixels, u32 channels, u32 blocks) {
    const u32 n = batch * pixels * channels;
    auto x = noise(n), images = noise(n);
    std::vector<double> partial(blocks);
    std::vector<float> gradient(n);
    float to, grad = 0.5f;
    u32 counter = 0;
    launch({blocks, 1, 1}, 256, [&] {
        image_error(x.data(), images.data(), partial.data(), &to, &counter, n, 3. / n, pixels, channels);
    });
    launch({2, 1, 1}, 32, [&] {
        image_error_gradient(x.data(), images.data(), &grad, gradient.data(), n, 4.f, pixels, channels);
    });
    double sum = 0;
    for (u32 b = 0; b < batch; b++)
        for (u32 p = 0; p < pixels; p++)
            for (u32 c = 0; c < channels; c++) {
                const u32 i = (b * pixels + p) * channels + c;
                const double difference = x[i] - images[(b * channels + c) * pixels + p];
                sum += difference * difference;
                check(near(gradient[i], 2 * difference, 1e-6), "image_error_gradient");
            }
    check(near(to, 3 * sum / n, 1e-6) && counter == 0, "image_error");
}

static void codes(u32 count, u32 size, u32 dim, bool ties) {
    auto z = noise(count * dim), codebook = noise(size * dim);
    if (ties) {
        // Half of the codes are there twice, vectors sit on codes or between two.
        for (u32 k = 0; k + 1 < size; k += 2)
            std::memcpy(&codebook[(k + 1) * dim], &codebook[k * dim], 4 * dim);
        for (u32 i = 0; i < count; i += 2)
            for (u32 d = 0; d < dim; d++) z[i * dim + d] = codebook[generator() % 1 + (i * 7 % size) * dim + d];
        if (count > 2) z[1 * dim + dim / 2] = NAN;
        if (count > 4) z[3 * dim] = INFINITY;
    }
    std::vector<float> mean(dim), norms(size);
    std::vector<u32> found(count, 12345);
    launch({dim, 1, 1}, 256, [&] { codebook_mean(codebook.data(), mean.data(), size, dim); });
    launch({(size + 7) / 8, 1, 1}, 256, [&] { half_norms(codebook.data(), mean.data(), norms.data(), size, dim); });
    std::vector<u32> found_64(count, 12345);
    launch({(count + 63) / 64, 1, 1}, 256, [&] {
        nearest_64(z.data(), codebook.data(), mean.data(), norms.data(), found_64.data(), count, size, dim);
    });
    launch({(count + 127) / 128, 1, 1}, 256, [&] {
        nearest_128(z.data(), codebook.data(), mean.data(), norms.data(), found.data(), count, size, dim);
    });
    for (u32 i = 0; i < count; i++) {
        double least = INFINITY;
        u32 place = NONE;
        for (u32 k = 0; k < size; k++) {
            double distance = 0;
            for (u32 d = 0; d < dim; d++) distance += std::pow((double)z[i * dim + d] - codebook[k * dim + d], 2);
            if (distance < least) { least = distance; place = k; }
        }
        check(found[i] == place && found_64[i] == place, "nearest");
    }
    for (auto& code : found) if (code == NONE) code = size;  // out of range
    const int digits = 40;
    std::vector<u64> sums(size * dim);
    std::vector<u32> counted(size);
    std::vector<float> to(size * (dim + 1), -1);
    u32 most = 0;
    launch({3, 1, 1}, 256, [&] { largest(z.data(), &most, z.size()); });
    float expected_most = 0;
    for (float x : z) if (std::isfinite(x)) expected_most = std::max(expected_most, std::fabs(x));
    check(__uint_as_float(most) == expected_most, "largest");
    u32 is_unclean = 0;
    launch({3, 1, 1}, 256, [&] {
        add_vectors(z.data(), found.data(), &most, sums.data(), counted.data(), &is_unclean, count, size, dim, digits);
    });
    check(is_unclean == 0, "add_vectors, clean");
    launch({2, 1, 1}, 256, [&] {
        code_statistics(sums.data(), counted.data(), &most, &is_unclean, to.data(), sums.size(), size, digits);
    });
    for (u32 k = 0; k < size; k++) {
        u32 n = 0;
        for (u32 i = 0; i < count; i++) n += found[i] == k;
        check(to[size * dim + k] == n, "code_statistics, counts");
        for (u32 d = 0; d < dim; d++) {
            double sum = 0;
            for (u32 i = 0; i < count; i++) if (found[i] == k) sum += z[i * dim + d];
            check(near(to[k * dim + d], sum, 1e-7 * (1 + std::fabs(sum))), "code_statistics, sums");
        }
    }
    z[(count - 1) * dim] = INFINITY;
    found[count - 1] = 0;
    launch({3, 1, 1}, 256, [&] {
        add_vectors(z.data(), found.data(), &most, sums.data(), counted.data(), &is_unclean, count, size, dim, digits);
    });
    launch({2, 1, 1}, 256, [&] {
        code_statistics(sums.data(), counted.data(), &most, &is_unclean, to.data(), sums.size(), size, digits);
    });
    check(std::isnan(to[0]) && !std::isnan(to[size * dim]), "code_statistics, unclean");
}

template <int N> static void looking_up(u32 dim) {
    const u32 size = 5;
    Padded<float> table(noise(size * dim));
    const std::vector<u32> numbers = {4, 0, 5, 4, 2, NONE, 1};
    Padded<float> to{std::vector<float>(numbers.size() * dim)};
    launch({2, 1, 1}, 32, [&] {
        lookup_rows<N>(table.at, numbers.data(), to.at, numbers.size() * dim / N, size, dim);
    });
    for (size_t i = 0; i < numbers.size(); i++)
        for (u32 d = 0; d < dim; d++)
            check(same(to.at[i * dim + d], numbers[i] < size ? table.at[numbers[i] * dim + d] : NAN), "lookup");
}

static void counting(u32 count, u32 codebooks, u32 size) {
    std::vector<u32> codes(count), counts(codebooks * size), expected(counts);
    for (u32 i = 0; i < count; i++) {
        codes[i] = generator() % (size + 1);
        if (codes[i] < size) expected[i % codebooks * size + codes[i]]++;
    }
    launch({3, 1, 1}, 64, [&] { count_codes(codes.data(), counts.data(), count, codebooks, size); });
    check(counts == expected, "count_codes");
}

static void optimizer() {
    const size_t lengths[3] = {1, 300, 77};
    std::vector<std::vector<float>> data[5];
    AdamTable table = {};
    SumTable sums = {};
    for (auto& group : data) for (size_t n : lengths) group.push_back(noise(n));
    for (auto& second : data[3]) for (auto& v : second) v = std::fabs(v);
    auto before = std::vector(data, data + 5);
    double squared = 0;
    for (int i = 0; i < 3; i++) {
        float* average = i == 1 ? nullptr : data[4][i].data();
        table.at[i] = {data[0][i].data(), data[1][i].data(), data[2][i].data(), data[3][i].data(), average, lengths[i], i != 2};
        sums.at[i] = {data[1][i].data(), lengths[i]};
        for (float g : data[1][i]) squared += (double)g * g;
    }
    std::vector<double> partial(3 * 4);
    float norm[2];
    launch({4, 3, 1}, 256, [&] { squares(sums, partial.data()); });
    launch({1, 1, 1}, 256, [&] { norm_and_scale(partial.data(), norm, 12, 2.f); });
    check(near(norm[0], std::sqrt(squared), 1e-5), "squares");
    check(near(norm[1], 2. / std::sqrt(squared), 1e-6), "norm_and_scale");
    AdamNumbers numbers = {0.5f, 0.9f, 0.99f, 0.1f, 1.5f, 1e-8f, 0.01f, 0.999f};
    float none = NAN;
    launch({2, 3, 1}, 64, [&] { adamw(table, &numbers, &none); });
    check(data[0][1] == before[0][1] && data[3][2] == before[3][2], "adamw leaves all as it is at a factor that is none");
    launch({2, 3, 1}, 64, [&] { adamw(table, &numbers, norm + 1); });
    for (int i = 0; i < 3; i++)
        for (size_t j = 0; j < lengths[i]; j++) {
            double g = before[1][i][j] * 0.5 * norm[1], m = 0.9 * before[2][i][j] + 0.1 * g;
            double v = 0.99 * before[3][i][j] + 0.01 * g * g;
            double p = before[0][i][j] * (i != 2 ? 0.999 : 1.) - 0.1 * m / (std::sqrt(v) * 1.5 + 1e-8);
            check(near(data[2][i][j], m, 1e-6) && near(data[3][i][j], v, 1e-6), "adamw, moments");
            check(near(data[0][i][j], p, 2e-6 * (1 + std::fabs(p))), "adamw, parameters");
            double a = before[4][i][j] + (i == 1 ? 0 : 0.01 * (p - before[4][i][j]));
            check(near(data[4][i][j], a, 1e-6 * (1 + std::fabs(a))), "adamw, averages");
        }
    partial[3] = NAN;
    launch({1, 1, 1}, 256, [&] { norm_and_scale(partial.data(), norm, 12, 2.f); });
    check(std::isnan(norm[0]) && std::isnan(norm[1]), "norm_and_scale says when there is no norm");
}

static void averages(u32 dim, bool is_cosine) {
    const u32 codes = 300;
    std::vector<float> counts(codes), usage(codes);
    for (u32 k = 0; k < codes; k++) { counts[k] = k % 3; usage[k] = 0.1f + k % 7; }
    auto sums = noise(codes * dim), averaged = noise(codes * dim), codebook = noise(codes * dim);
    auto usage_before = usage, averaged_before = averaged, codebook_before = codebook;
    float total;
    u32 step = 4;
    const double decay = 0.99, warmup = 9, epsilon = 1e-3, d = 4. / 13.;
    launch({1, 1, 1}, 256, [&] { average_usage(counts.data(), usage.data(), &total, &step, decay, warmup, codes); });
    double all = 0;
    for (u32 k = 0; k < codes; k++) {
        check(near(usage[k], d * usage_before[k] + (1 - d) * counts[k], 1e-6), "average_usage");
        all += usage[k];
    }
    check(near(total, all, 1e-3), "average_usage, total");
    launch({codes, 1, 1}, 32, [&] {
        average_codebook(counts.data(), sums.data(), usage.data(), &total, averaged.data(), codebook.data(), &step, decay,
                         warmup, epsilon, codes, dim, is_cosine);
    });
    for (u32 k = 0; k < codes; k++) {
        double smoothed = (usage[k] + epsilon) / (all + codes * epsilon) * all, square = 0;
        for (u32 i = 0; i < dim; i++) {
            u32 at = k * dim + i;
            check(near(averaged[at], d * averaged_before[at] + (1 - d) * sums[at], 1e-6), "average_codebook, sums");
            square += averaged[at] / smoothed * (averaged[at] / smoothed);
        }
        double scale = is_cosine ? std::sqrt(square) : 1;
        for (u32 i = 0; i < dim; i++) {
            u32 at = k * dim + i;
            double e = counts[k] > 0 ? averaged[at] / smoothed / scale : codebook_before[at];
            check(near(codebook[at], e, 1e-4 * (1 + std::fabs(e))), "average_codebook");
        }
    }
}

template <int N> static void pictures(u32 width) {
    const u32 all = 5, channels = 3, height = 4, size = channels * height * width;
    std::vector<unsigned char> random(all * size);
    for (auto& pixel : random) pixel = generator();
    Padded<unsigned char> pixels(random);
    auto tables = noise(channels * 256);
    std::vector<u32> indices = {4, 0x80000000u | 2, 0, 0x80000000u};
    Padded<float> to{std::vector<float>(indices.size() * size)};
    launch({3, 1, 1}, 32, [&] {
        make_images<N>(pixels.at, indices.data(), tables.data(), to.at, indices.size(), channels, height, width);
    });
    for (u32 b = 0; b < indices.size(); b++)
        for (u32 c = 0; c < channels; c++)
            for (u32 y = 0; y < height; y++)
                for (u32 x = 0; x < width; x++) {
                    u32 from = indices[b] >> 31 ? width - 1 - x : x, image = indices[b] & 0x7fffffffu;
                    float expected = tables[c * 256 + pixels.at[((image * channels + c) * height + y) * width + from]];
                    check(to.at[((b * channels + c) * height + y) * width + x] == expected, "images");
                }
}

// −ln p as the definition says it.
template <int C> static double nats_of(const std::vector<double>& p, const unsigned char* pixels, u32 mixtures) {
    auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
    double total = 0, mass = 0;
    for (u32 m = 0; m < mixtures; m++) total += std::exp(p[m]);
    for (u32 m = 0; m < mixtures; m++) {
        double product = std::exp(p[m]) / total;
        for (int c = 0; c < C; c++) {
            double mean = p[(1 + c) * mixtures + m];
            for (int b = 0; b < c; b++)
                mean += std::tanh(p[(1 + 2 * C + c * (c - 1) / 2 + b) * mixtures + m]) * (pixels[b] / 127.5 - 1);
            const double s = std::exp(std::min(7., std::max(-7., p[(1 + C + c) * mixtures + m])));
            const double x = pixels[c] / 127.5 - 1;
            product *= (pixels[c] == 255 ? 1 : sigmoid((x + 1 / 255. - mean) / s)) -
                       (pixels[c] == 0 ? 0 : sigmoid((x - 1 / 255. - mean) / s));
        }
        mass += product;
    }
    return -std::log(mass);
}

template <int C> static void mixtures(u32 count, u32 rows) {
    const u32 size = Mixture<C>::size(count);
    auto params = noise(rows * size, 2.f), grad = noise(rows * (1 + C));
    params[size - 1] = 0.5f;
    if (rows > 1) params[size + (1 + C) * count] = 8.f;   // a scale out of range
    std::vector<unsigned char> pixels(rows * C);
    for (auto& pixel : pixels) pixel = generator() % 4 == 0 ? 255 * (generator() % 2) : generator() % 256;
    std::vector<float> to(rows * (1 + C), NAN), gradient(rows * size, NAN);
    launch({3, 1, 1}, MIXTURE_THREADS, [&] { mixture_nats<C>(params.data(), pixels.data(), to.data(), rows, count); });
    launch({3, 1, 1}, MIXTURE_THREADS, [&] {
        mixture_gradient<C>(params.data(), pixels.data(), grad.data(), gradient.data(), rows, count);
    });
    for (u32 r = 0; r < rows; r++) {
        std::vector<double> p(params.begin() + r * size, params.begin() + (r + 1) * size);
        const double exact = nats_of<C>(p, &pixels[r * C], count);
        check(near(to[r * (1 + C)], exact, 2e-5 * std::max(1., exact)), "mixture_nats");
        for (int c = 0; c < C; c++) {
            // The weights add up to 1 but for rounding.
            const float mean = to[r * (1 + C) + 1 + c];
            check(mean >= 0 && mean <= 1.00001f, "mixture_nats, means");
        }
        for (u32 i = 0; i < size; i++) {
            const double before = p[i], step = 1e-5;
            p[i] = before + step;
            const double above = nats_of<C>(p, &pixels[r * C], count);
            p[i] = before - step;
            const double slope = (above - nats_of<C>(p, &pixels[r * C], count)) / (2 * step);
            p[i] = before;
            const double expected = grad[r * (1 + C)] * slope;
            check(near(gradient[r * size + i], expected, 1e-4 * std::max(1., std::fabs(expected))), "mixture_gradient");
        }
    }
}

int main() {
    conversions();
    weights<float>(); weights<bf16>();
    finishing<float, 1>(3); finishing<bf16, 1>(5); finishing<float, 4>(8); finishing<bf16, 8>(16);
    sums<float, 1>(100, 3, 4); sums<bf16, 1>(37, 70, 1); sums<float, 1>(5, 333, 8);
    sums<float, 4>(100, 64, 3); sums<bf16, 8>(300, 128, 5); sums<bf16, 8>(9, 2056, 2);
    sums<float, 4>(50, 384, 3); sums<bf16, 8>(50, 384, 3);
    folding<float, 4>(3, 4, 2, 1); folding<bf16, 8>(3, 4, 2, 1); folding<float, 4>(1, 4, 4, 0); folding<float, 4>(4, 3, 1, 1);
    axes();
    joining<float, float, 1>(3, 4, 2, 7); joining<bf16, bf16, 1>(5, 8, 1, 8); joining<float, bf16, 1>(3, 3, 5, 8);
    joining<bf16, float, 8>(16, 24, 8, 24); joining<bf16, bf16, 8>(8, 8, 16, 32); joining<float, bf16, 8>(8, 16, 8, 16);
    errors(1, 1); errors(1000, 3);
    errors_of_images(2, 35, 3, 3); errors_of_images(3, 7, 1, 1);
    codes(1, 1, 1, false); codes(70, 5, 3, false); codes(130, 100, 20, true); codes(65, 64, 64, true);
    looking_up<1>(3); looking_up<4>(12);
    codes(5, 2, 300, true); codes(2100, 7, 4, false); codes(150, 300, 20, true); codes(200, 260, 35, false);
    counting(1000, 1, 7); counting(900, 3, 40); counting(500, 1, 5000);
    optimizer();
    averages(7, false); averages(40, true);
    mixtures<1>(1, 3); mixtures<2>(5, 200); mixtures<3>(10, 130); mixtures<4>(3, 7); mixtures<3>(1100, 2);
    pictures<1>(6); pictures<4>(8);
    std::puts("all kernels agree");
}
