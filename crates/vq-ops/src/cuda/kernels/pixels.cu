// The likelihood of pixels under mixtures of discretised logistics: as crates/vq-ops/src/pixels/logistic.rs, which
// says what stands where.

#define MIXTURE_THREADS 64
// Numbers of the positions that a block has before it.
#define MIXTURE_ROOM 11776
#define HALF_STEP (1.f / 255.f)

struct LogMass { float value, by_centred, by_log_scale; };

// Unlike fminf and fmaxf it lets NaN through.
__device__ inline float within(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

// ln (σ(p) − σ(q)) with p and q = (value − mean ± 1/255) / s, and its derivatives.
__device__ inline LogMass log_mass(float value, float mean, float given) {
    const bool lowest = value <= -1.f, highest = value >= 1.f, edge = lowest || highest;
    const float inverse = expf(-within(given, -7.f, 7.f)), centred = value - mean;
    const float p = inverse * (centred + HALF_STEP), q = inverse * (centred - HALF_STEP);
    const float of_p = expf(-fabsf(p)), of_q = expf(-fabsf(q));
    float share_p = 1.f / (1.f + of_p), share_q = 1.f / (1.f + of_q);
    // σ(−p) and σ(q): what lies above and below.
    const float above = highest ? 0.f : p >= 0.f ? of_p * share_p : share_p;
    const float below = lowest ? 0.f : q >= 0.f ? share_q : of_q * share_q;
    const float width = inverse * (2.f * HALF_STEP), inside = -expm1f(-width);
    // ln σ(p) = min(p, 0) + ln 1/(1 + e^−|p|), and so ln σ(−q).
    const float logs = (highest ? 0.f : p < 0.f ? p : 0.f) + (lowest ? 0.f : q > 0.f ? -q : 0.f);
    if (highest) share_p = 1.f;
    if (lowest) share_q = 1.f;
    const float narrowing = edge ? 0.f : width * (1.f - inside) / inside;
    return {logs + logf(share_p * share_q * (edge ? 1.f : inside)), inverse * (above - below),
            q * below - p * above - narrowing};
}

// ln Σ e^x of numbers that come one by one. NaN is passed over by the maximum and comes back through the sum.
struct LogSum {
    float most, sum;
    __device__ void add(float x) {
        if (x == -INFINITE) return;
        if (x > most) {
            sum = sum * expf(most - x) + 1.f;
            most = x;
        } else {
            sum += expf(x - most);
        }
    }
    __device__ float value() const { return most + logf(sum); }
};

// A position's mixture of `mixtures` components of C channels.
template <int C> struct Mixture {
    static constexpr int PAIRS = C * (C - 1) / 2;
    const float* params;
    u32 mixtures;
    float values[C];   // in [−1, 1]

    static __device__ u32 size(u32 mixtures) { return mixtures * (1 + 2 * C + PAIRS); }
    __device__ u32 mean_at(u32 m, int c) const { return (1 + c) * mixtures + m; }
    __device__ u32 log_scale_at(u32 m, int c) const { return (1 + C + c) * mixtures + m; }
    __device__ u32 coefficient_at(u32 m, int pair) const { return (1 + 2 * C + pair) * mixtures + m; }

    __device__ void slopes(u32 m, float (&slope)[PAIRS + 1]) const {
        #pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) slope[pair] = tanhf(params[coefficient_at(m, pair)]);
    }
    // Of a component's channel where those before have these values.
    __device__ float mean(u32 m, int c, const float (&slope)[PAIRS + 1], const float (&before)[C]) const {
        float mean = params[mean_at(m, c)];
        #pragma unroll
        for (int b = 0; b < c; b++) mean += slope[c * (c - 1) / 2 + b] * before[b];
        return mean;
    }
    // ln (π · p) of a component, up to the logarithm of Σ π.
    __device__ float term(u32 m, const float (&slope)[PAIRS + 1], LogMass (&masses)[C]) const {
        float sum = params[m];
        #pragma unroll
        for (int c = 0; c < C; c++) {
            masses[c] = log_mass(values[c], mean(m, c, slope, values), params[log_scale_at(m, c)]);
            sum += masses[c].value;
        }
        return sum;
    }
    __device__ float prior() const {
        LogSum sum = {-INFINITE, 0.f};
        for (u32 m = 0; m < mixtures; m++) sum.add(params[m]);
        return sum.value();
    }
    __device__ float joint() const {
        LogSum sum = {-INFINITE, 0.f};
        float slope[PAIRS + 1];
        LogMass masses[C];
        for (u32 m = 0; m < mixtures; m++) {
            slopes(m, slope);
            sum.add(term(m, slope, masses));
        }
        return sum.value();
    }
};

// Calls `work` with each position's mixture, whose numbers lie in shared memory where they may be changed; and takes
// them to `to` after that, where it is given. MIXTURE_THREADS threads.
template <int C, typename Work>
__device__ void each_mixture(const float* params, const unsigned char* pixels, float* to, u64 rows, u32 mixtures,
                             Work work) {
    __shared__ float room[MIXTURE_ROOM];
    const u32 size = Mixture<C>::size(mixtures);
    // Odd, so that threads side by side meet different banks.
    const u32 line = size | 1, most = MIXTURE_ROOM / line < MIXTURE_THREADS ? MIXTURE_ROOM / line : MIXTURE_THREADS;
    for (u64 first = (u64)blockIdx.x * most; first < rows; first += (u64)gridDim.x * most) {
        const u32 here = rows - first < most ? (u32)(rows - first) : most;
        __syncthreads();
        for (u32 i = threadIdx.x; i < here * size; i += MIXTURE_THREADS) {
            const u32 row = i / size;
            room[row * line + i - row * size] = params[first * size + i];
        }
        __syncthreads();
        if (threadIdx.x < here) {
            const u64 row = first + threadIdx.x;
            Mixture<C> mixture = {room + threadIdx.x * line, mixtures, {}};
            #pragma unroll
            for (int c = 0; c < C; c++) mixture.values[c] = pixels[row * C + c] / 127.5f - 1.f;
            work(row, mixture, room + threadIdx.x * line);
        }
        if (!to) continue;
        __syncthreads();
        for (u32 i = threadIdx.x; i < here * size; i += MIXTURE_THREADS) {
            const u32 row = i / size;
            to[first * size + i] = room[row * line + i - row * size];
        }
    }
}

// params [rows][size], pixels [rows][C] → [rows][1 + C]: −ln p in nats, and the means in [0, 1].
template <int C>
__device__ void mixture_nats(const float* params, const unsigned char* pixels, float* to, u64 rows, u32 mixtures) {
    each_mixture<C>(params, pixels, nullptr, rows, mixtures, [&](u64 row, const Mixture<C>& mixture, float*) {
        const float prior = mixture.prior();
        float means[C] = {}, slope[Mixture<C>::PAIRS + 1];
        for (u32 m = 0; m < mixtures; m++) {
            const float weight = expf(mixture.params[m] - prior);
            float before[C] = {};
            mixture.slopes(m, slope);
            #pragma unroll
            for (int c = 0; c < C; c++) {
                before[c] = within(mixture.mean(m, c, slope, before), -1.f, 1.f);
                means[c] += weight * (0.5f * before[c] + 0.5f);
            }
        }
        to[row * (1 + C)] = prior - mixture.joint();
        #pragma unroll
        for (int c = 0; c < C; c++) to[row * (1 + C) + 1 + c] = means[c];
    });
}

// The gradient in params, [rows][size], where that of the nats is the first of each row of grad [rows][1 + C].
template <int C>
__device__ void mixture_gradient(const float* params, const unsigned char* pixels, const float* grad, float* to,
                                 u64 rows, u32 mixtures) {
    each_mixture<C>(params, pixels, to, rows, mixtures, [&](u64 row, const Mixture<C>& mixture, float* own) {
        const float prior = mixture.prior(), joint = mixture.joint(), of_nats = grad[row * (1 + C)];
        float slope[Mixture<C>::PAIRS + 1];
        LogMass masses[C];
        for (u32 m = 0; m < mixtures; m++) {
            mixture.slopes(m, slope);
            // The component's share of the pixel's probability. No other one looks at its numbers after this.
            const float share = expf(mixture.term(m, slope, masses) - joint);
            own[m] = of_nats * (expf(own[m] - prior) - share);
            #pragma unroll
            for (int c = 0; c < C; c++) {
                const float mean = of_nats * share * masses[c].by_centred;
                own[mixture.mean_at(m, c)] = mean;
                const float given = own[mixture.log_scale_at(m, c)];
                const bool is_inside = given >= -7.f && given <= 7.f;
                own[mixture.log_scale_at(m, c)] = is_inside ? -of_nats * share * masses[c].by_log_scale : 0.f;
                #pragma unroll
                for (int b = 0; b < c; b++) {
                    const int pair = c * (c - 1) / 2 + b;
                    own[mixture.coefficient_at(m, pair)] = mean * mixture.values[b] * (1.f - slope[pair] * slope[pair]);
                }
            }
        }
    });
}

#define MIXTURE(C)                                                                                              \
    extern "C" __global__ void mixture_nats_##C(const float* params, const unsigned char* pixels, float* to,   \
                                                u64 rows, u32 mixtures) {                                       \
        mixture_nats<C>(params, pixels, to, rows, mixtures);                                                    \
    }                                                                                                           \
    extern "C" __global__ void mixture_gradient_##C(const float* params, const unsigned char* pixels,          \
                                                    const float* grad, float* to, u64 rows, u32 mixtures) {     \
        mixture_gradient<C>(params, pixels, grad, to, rows, mixtures);                                          \
    }
MIXTURE(1)
MIXTURE(2)
MIXTURE(3)
MIXTURE(4)
