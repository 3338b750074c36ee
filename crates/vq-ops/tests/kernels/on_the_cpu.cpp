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

struct Index { unsigned x = 0, y = 0, z = 0; };
static Index threadIdx, blockIdx, blockDim, gridDim;
static ucontext_t scheduler, contexts[256];
static char stacks[256][64 << 10];
static bool is_done[256];
static void __syncthreads() { unsigned t = threadIdx.x; swapcontext(&contexts[t], &scheduler); }
static float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }

#include "../../src/cuda/kernels/common.cu"
#include "../../src/cuda/kernels/layers.cu"
#include "../../src/cuda/kernels/codebook.cu"
#include "../../src/cuda/kernels/training.cu"

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
    const u32 outer = 5, inner = 3, taps = 9;
    auto w = noise(outer * inner * taps);
    std::vector<T> packed(w.size());
    std::vector<float> back(w.size());
    launch({2, 1, 1}, 32, [&] { pack_weight<T>(w.data(), packed.data(), outer, inner, taps); });
    for (u32 o = 0; o < outer; o++)
        for (u32 c = 0; c < inner; c++)
            for (u32 t = 0; t < taps; t++)
                check(packed[(o * taps + t) * inner + c] == from_float<T>(w[(o * inner + c) * taps + t]), "pack_weight");
    launch({2, 1, 1}, 32, [&] { unpack_weight<T>(packed.data(), back.data(), outer, inner, taps); });
    for (size_t i = 0; i < w.size(); i++) check(back[i] == to_float(from_float<T>(w[i])), "unpack_weight");
}

template <typename T> static void finishing(u32 channels, bool by_four) {
    const u32 rows = 7, n = rows * channels;
    auto values = noise(n);
    values[3] = NAN;
    auto y = rounded<T>(values), residual = rounded<T>(noise(n));
    auto bias = noise(channels);
    for (int which = 0; which < 8; which++) {
        const float* b = which & 1 ? bias.data() : nullptr;
        const T* r = which & 2 ? residual.data() : nullptr;
        std::vector<T> plain(n), rectified(n);
        T* p = which & 4 ? plain.data() : nullptr;
        launch({3, 1, 1}, 32, [&] { finish<T>(y.data(), b, r, p, rectified.data(), n, channels, by_four); });
        for (u32 i = 0; i < n; i++) {
            float sum = to_float(y[i]);
            if (b) sum += bias[i % channels];
            if (r) sum += to_float(residual[i]);
            T expected = from_float<T>(sum);
            if (p) check(same(to_float(plain[i]), to_float(expected)), "finish");
            check(same(to_float(rectified[i]), relu(to_float(expected))), "finish, rectified");
        }
    }
}

template <typename T> static void masks() {
    const u32 n = 100;
    auto grad = rounded<T>(noise(n)), gate = rounded<T>(noise(n)), more = rounded<T>(noise(n));
    gate[5] = from_float<T>(NAN); gate[6] = from_float<T>(0.f);
    for (bool adds : {false, true}) {
        std::vector<T> to(n);
        launch({2, 1, 1}, 32, [&] { mask<T>(grad.data(), gate.data(), adds ? more.data() : nullptr, to.data(), n); });
        for (u32 i = 0; i < n; i++) {
            float expected = to_float(gate[i]) <= 0.f ? 0.f : to_float(grad[i]);
            if (adds) expected += to_float(more[i]);
            check(to[i] == from_float<T>(expected), "mask");
        }
    }
}

template <typename T> static void sums(u32 rows, u32 columns, u32 parts) {
    auto values = rounded<T>(noise(rows * columns));
    std::vector<float> partial(parts * columns), to(columns);
    launch({(columns + 31) / 32, parts, 1}, 256, [&] { column_sums<T>(values.data(), partial.data(), rows, columns); });
    launch({(columns + 255) / 256, 1, 1}, 256, [&] { add_rows_f32(partial.data(), to.data(), parts, columns); });
    for (u32 c = 0; c < columns; c++) {
        double sum = 0;
        for (u32 r = 0; r < rows; r++) sum += to_float(values[r * columns + c]);
        check(near(to[c], sum, 1e-6 * rows), "column_sums");
    }
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
    launch({(size + 255) / 256, 1, 1}, 256, [&] { half_norms(codebook.data(), mean.data(), norms.data(), size, dim); });
    launch({(count + ROWS - 1) / ROWS, 1, 1}, SIDE * SIDE, [&] {
        nearest(z.data(), codebook.data(), mean.data(), norms.data(), found.data(), count, size, dim);
    });
    for (u32 i = 0; i < count; i++) {
        double least = INFINITY;
        u32 place = NONE;
        for (u32 k = 0; k < size; k++) {
            double distance = 0;
            for (u32 d = 0; d < dim; d++) distance += std::pow((double)z[i * dim + d] - codebook[k * dim + d], 2);
            if (distance < least) { least = distance; place = k; }
        }
        check(found[i] == place, "nearest");
    }
    for (auto& code : found) if (code == NONE) code = size;  // out of range
    std::vector<float> counts(size, -1), totals(size * dim, -1);
    launch({size, (dim + 255) / 256, 1}, 256, [&] {
        code_statistics(z.data(), found.data(), counts.data(), totals.data(), count, size, dim);
    });
    for (u32 k = 0; k < size; k++) {
        float n = 0;
        for (u32 d = 0; d < dim; d++) {
            float sum = 0;
            n = 0;
            for (u32 i = 0; i < count; i++) if (found[i] == k) { sum += z[i * dim + d]; n++; }
            check(totals[k * dim + d] == sum, "code_statistics, sums");
        }
        check(counts[k] == n, "code_statistics, counts");
    }
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

static void pictures() {
    const u32 all = 5, channels = 3, height = 4, width = 6, size = channels * height * width;
    std::vector<unsigned char> pixels(all * size);
    for (auto& pixel : pixels) pixel = generator();
    auto tables = noise(channels * 256);
    std::vector<u32> indices = {4, 0x80000000u | 2, 0, 0x80000000u};
    std::vector<float> to(indices.size() * size);
    launch({3, 1, 1}, 32, [&] {
        images(pixels.data(), indices.data(), tables.data(), to.data(), indices.size(), channels, height, width);
    });
    for (u32 b = 0; b < indices.size(); b++)
        for (u32 c = 0; c < channels; c++)
            for (u32 y = 0; y < height; y++)
                for (u32 x = 0; x < width; x++) {
                    u32 from = indices[b] >> 31 ? width - 1 - x : x, image = indices[b] & 0x7fffffffu;
                    float expected = tables[c * 256 + pixels[((image * channels + c) * height + y) * width + from]];
                    check(to[((b * channels + c) * height + y) * width + x] == expected, "images");
                }
}

int main() {
    conversions();
    weights<float>(); weights<bf16>();
    finishing<float>(3, false); finishing<bf16>(5, false); finishing<float>(8, true); finishing<bf16>(4, true);
    masks<float>(); masks<bf16>();
    sums<float>(100, 3, 4); sums<bf16>(37, 70, 1); sums<float>(5, 33, 8);
    codes(1, 1, 1, false); codes(70, 5, 3, false); codes(130, 100, 20, true); codes(65, 64, 64, true);
    codes(5, 2, 300, true); codes(2100, 7, 4, false);
    optimizer();
    averages(7, false); averages(40, true);
    pictures();
    std::puts("all kernels agree");
}
