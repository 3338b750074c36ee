// The nearest code of each vector, and what was assigned to each code.

// The codebook's mean: one block of 256 threads per component.
extern "C" __global__ void codebook_mean(const float* codebook, float* mean, u32 codes, u32 dim) {
    double sum = 0.;
    for (u32 k = threadIdx.x; k < codes; k += 256) sum += codebook[(u64)k * dim + blockIdx.x];
    sum = block_sum(sum);
    if (threadIdx.x == 0) mean[blockIdx.x] = (float)(sum / codes);
}

// ½‖e − mean‖² of every code: 32 threads each, 8 codes a block.
extern "C" __global__ void half_norms(const float* codebook, const float* mean, float* norms, u32 codes,
                                      u32 dim) {
    __shared__ double sums[256];
    const u32 lane = threadIdx.x % 32, k = blockIdx.x * 8 + threadIdx.x / 32;
    double sum = 0.;
    for (u32 d = lane; d < dim && k < codes; d += 32) {
        double x = codebook[(u64)k * dim + d] - mean[d];
        sum += x * x;
    }
    sums[threadIdx.x] = sum;
    for (u32 width = 16; width > 0; width /= 2) {
        __syncthreads();
        if (lane < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    }
    if (lane == 0 && k < codes) norms[k] = (float)(0.5 * sums[threadIdx.x]);
}

#define NONE 0xffffffffu
#define INFINITE __uint_as_float(0x7f800000u)
#define CODES 128  // codes that a block's vectors meet at a time
#define DEPTH 16   // components at a time
#define SIDE 16    // a block is SIDE × SIDE threads

// A score and its code, and the best score of any other code.
struct Best { float score, second; u32 code; };

// What is known of two sets of codes, as of one.
__device__ inline void take(Best& best, const Best& other) {
    if (other.score < best.score || (other.score == best.score && other.code < best.code)) {
        best.second = other.second < best.score ? other.second : best.score;
        best.score = other.score;
        best.code = other.code;
    } else if (other.score < best.second) {
        best.second = other.score;
    }
}

// ‖z − e‖² in f64. By four where both lie so.
__device__ inline double distance(const float* z, const float* e, u32 dim, bool by_four) {
    double sums[4] = {};
    if (by_four) {
        for (u32 d = 0; d < dim; d += 4) {
            Group<float, 4> a = *(const Group<float, 4>*)(z + d), b = *(const Group<float, 4>*)(e + d);
            for (int i = 0; i < 4; i++) {
                double x = (double)a.at[i] - (double)b.at[i];
                sums[i] += x * x;
            }
        }
    } else {
        for (u32 d = 0; d < dim; d++) {
            double x = (double)z[d] - (double)e[d];
            sums[d % 4] += x * x;
        }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The largest of all codes' norms, for all. 256 threads.
__device__ inline float largest_norm_of(const float* norms, u32 codes) {
    __shared__ float all[256];
    float most = 0.f;
    for (u32 k = threadIdx.x; k < codes; k += 256) most = norms[k] > most ? norms[k] : most;
    all[threadIdx.x] = most;
    for (u32 width = 128; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width && all[threadIdx.x + width] > all[threadIdx.x]) all[threadIdx.x] = all[threadIdx.x + width];
    }
    __syncthreads();
    return all[0];
}

// What remains of a search by scores ½‖e − mean‖² − (z − mean)·(e − mean) in f32, of the ROWS vectors of a block from
// `first` on. Thread number r knows the best of vector r and ‖z − mean‖². A score is a sum of `dim` rounded products
// of at most ‖z‖·‖e‖ in all. Where the second-best is closer than that can tell apart, the vector is searched
// again in f64. 256 threads.
template <u32 ROWS>
__device__ void settle(const float* z, const float* codebook, u32* found, u32 first, u32 count, u32 codes, u32 dim,
                       float largest_norm, const Best& whole, float row_norm) {
    __shared__ u32 unclear[ROWS];
    __shared__ u32 unclear_count;
    __shared__ double distances[256];
    __shared__ u32 places[256];
    const u32 thread = threadIdx.x;
    if (thread == 0) unclear_count = 0;
    __syncthreads();
    if (thread < ROWS && first + thread < count) {
        const float radius = sqrtf(2.f * largest_norm);
        const float rounding = 5.9604645e-8f * (dim + 16.f) * radius * (sqrtf(row_norm) + radius);
        // False where something is not a number.
        bool is_clear = codes == 1 ? is_finite(whole.score) : whole.second - whole.score > 2.f * rounding;
        found[first + thread] = whole.code;
        if (!is_clear) unclear[atomicAdd(&unclear_count, 1u)] = thread;
    }
    __syncthreads();
    // These again, by direct differences in f64, the lowest code among ties: eight at a time, 32 threads each.
    const u32 lane = thread % 32, group = thread / 32;
    const bool by_four = dim % 4 == 0 && (((u64)z | (u64)codebook) & 15) == 0;
    for (u32 turn = 0; turn < unclear_count; turn += 8) {
        double least = (double)INFINITE;
        u32 place = NONE;
        if (turn + group < unclear_count) {
            const float* vector = z + (u64)(first + unclear[turn + group]) * dim;
            for (u32 k = lane; k < codes; k += 32) {
                double x = distance(vector, codebook + (u64)k * dim, dim, by_four);
                if (x < least) { least = x; place = k; }
            }
        }
        distances[thread] = least;
        places[thread] = place;
        for (u32 width = 16; width > 0; width /= 2) {
            __syncthreads();
            u32 other = thread + width;
            if (lane < width && (distances[other] < distances[thread] ||
                                 (distances[other] == distances[thread] && places[other] < places[thread]))) {
                distances[thread] = distances[other];
                places[thread] = places[other];
            }
        }
        if (lane == 0 && turn + group < unclear_count) found[first + unclear[turn + group]] = places[thread];
        __syncthreads();
    }
}

// A code's score, met in ascending order of the codes, so that the first of equals stays.
__device__ inline void meet(Best& best, float score, u32 code) {
    const bool is_better = score < best.score;
    const float worse = is_better ? best.score : score;
    best.second = worse < best.second ? worse : best.second;
    best.score = is_better ? score : best.score;
    best.code = is_better ? code : best.code;
}

// The code with the least distance of each vector; the lowest of those that are equally far. A vector that is not
// finite gets NONE. In f32 and, where that is not enough, f64. A thread has OWN vectors, a block SIDE times as many.
// 256 threads.
template <int OWN>
__device__ void search(const float* __restrict__ z, const float* __restrict__ codebook,
                       const float* __restrict__ mean, const float* __restrict__ norms, u32* found, u32 count,
                       u32 codes, u32 dim) {
    constexpr u32 ROWS = SIDE * OWN, OF_CODES = CODES / SIDE;
    typedef Group<float, 4> Four;
    // So that threads that write one column meet different banks, and that four lie together.
    __shared__ Four zs_four[DEPTH][(ROWS + 4) / 4], es_four[DEPTH][(CODES + 4) / 4];
    // Of each thread's vectors.
    __shared__ float scores[OWN][256], seconds[OWN][256];
    __shared__ u32 its_codes[OWN][256];
    float (*zs)[ROWS + 4] = (float(*)[ROWS + 4])zs_four;
    float (*es)[CODES + 4] = (float(*)[CODES + 4])es_four;
    // 32 threads are 4 × 8 of them: so they read no more than 128 bytes at once.
    const u32 thread = threadIdx.x, tx = thread / 32 % 2 * 8 + thread % 8, ty = thread / 64 * 4 + thread % 32 / 8;
    const u32 place = ty * SIDE + tx, first = blockIdx.x * ROWS;
    const float largest_norm = largest_norm_of(norms, codes);
    float row_norm = 0.f;

    for (int i = 0; i < OWN; i++) {
        scores[i][place] = seconds[i][place] = INFINITE;
        its_codes[i][place] = NONE;
    }
    // Each thread brings one component of every 16th vector and code; the next ones while these are used.
    const u32 d_own = thread % DEPTH, r_own = thread / DEPTH;
    float z_next[ROWS / 16], e_next[CODES / 16], shift;
    // Loads without conditions, so that none waits for another; nothing is done with them until they are due.
    auto fetch = [&](u32 start, u32 deep) {
        const u32 d = deep + d_own < dim ? deep + d_own : 0;
        shift = mean[d];
        #pragma unroll
        for (u32 i = 0; i < ROWS / 16; i++) {
            u32 r = first + r_own + 16 * i;
            z_next[i] = z[(u64)(r < count ? r : count - 1) * dim + d];
        }
        #pragma unroll
        for (u32 i = 0; i < CODES / 16; i++) {
            u32 k = start + r_own + 16 * i;
            e_next[i] = codebook[(u64)(k < codes ? k : codes - 1) * dim + d];
        }
    };
    fetch(0, 0);
    for (u32 start = 0; start < codes; start += CODES) {
        float products[OWN][OF_CODES] = {};
        for (u32 deep = 0; deep < dim; deep += DEPTH) {
            const bool is_component = deep + d_own < dim;
            __syncthreads();
            #pragma unroll
            for (u32 i = 0; i < ROWS / 16; i++) zs[d_own][r_own + 16 * i] = is_component ? z_next[i] - shift : 0.f;
            #pragma unroll
            for (u32 i = 0; i < CODES / 16; i++) es[d_own][r_own + 16 * i] = is_component ? e_next[i] - shift : 0.f;
            __syncthreads();
            const bool is_through = deep + DEPTH >= dim;
            if (!is_through || start + CODES < codes) fetch(is_through ? start + CODES : start, is_through ? 0 : deep + DEPTH);
            if (start == 0 && thread < ROWS) {
                for (u32 d = 0; d < DEPTH; d++) row_norm += zs[d][thread] * zs[d][thread];
            }
            #pragma unroll
            for (u32 d = 0; d < DEPTH; d++) {
                float a[OWN], b[OF_CODES];
                #pragma unroll
                for (u32 i = 0; i < OWN; i += 4) {
                    Four four = zs_four[d][ty * (OWN / 4) + i / 4];
                    for (u32 j = 0; j < 4; j++) a[i + j] = four.at[j];
                }
                // Codes 4·tx to 4·tx + 3, and those 64 further on: so that threads side by side read what lies so.
                #pragma unroll
                for (u32 i = 0; i < OF_CODES; i += 4) {
                    Four four = es_four[d][tx + i / 4 * SIDE];
                    for (u32 j = 0; j < 4; j++) b[i + j] = four.at[j];
                }
                #pragma unroll
                for (u32 i = 0; i < OWN; i++) {
                    #pragma unroll
                    for (u32 j = 0; j < OF_CODES; j++) products[i][j] += a[i] * b[j];
                }
            }
        }
        float its_norms[OF_CODES];
        #pragma unroll
        for (u32 j = 0; j < OF_CODES; j++) {
            const u32 k = start + j / 4 * (4 * SIDE) + tx * 4 + j % 4;
            // No code is further away.
            its_norms[j] = k < codes ? norms[k] : INFINITE;
        }
        #pragma unroll
        for (u32 i = 0; i < OWN; i++) {
            Best best = {scores[i][place], seconds[i][place], its_codes[i][place]};
            #pragma unroll
            for (u32 j = 0; j < OF_CODES; j++) {
                meet(best, its_norms[j] - products[i][j], start + j / 4 * (4 * SIDE) + tx * 4 + j % 4);
            }
            scores[i][place] = best.score;
            seconds[i][place] = best.second;
            its_codes[i][place] = best.code;
        }
    }
    __syncthreads();
    Best whole = {INFINITE, INFINITE, NONE};
    if (thread < ROWS) {
        const u32 own = thread % OWN, line = thread / OWN * SIDE;
        #pragma unroll
        for (u32 x = 0; x < SIDE; x++) {
            take(whole, Best{scores[own][line + x], seconds[own][line + x], its_codes[own][line + x]});
        }
    }
    settle<ROWS>(z, codebook, found, first, count, codes, dim, largest_norm, whole, row_norm);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    nearest_64(const float* z, const float* codebook, const float* mean, const float* norms, u32* found, u32 count,
               u32 codes, u32 dim) {
    search<4>(z, codebook, mean, norms, found, count, codes, dim);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    nearest_128(const float* z, const float* codebook, const float* mean, const float* norms, u32* found, u32 count,
                u32 codes, u32 dim) {
    search<8>(z, codebook, mean, norms, found, count, codes, dim);
}

// Rows of a table [codes][dim], of the codes' numbers, in n groups of N; NaN for a code that is not there.
template <int N>
__device__ void lookup_rows(const float* __restrict__ table, const u32* __restrict__ numbers, float* __restrict__ to,
                            u64 n, u32 codes, u32 dim) {
    typedef Group<float, N> Elements;
    const u32 groups = dim / N;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        const u64 row = quotient(i, groups);
        const u32 code = numbers[row];
        Elements values = *(const Elements*)(table + (u64)(code < codes ? code : 0) * dim + (i - row * groups) * N);
        if (code >= codes) {
            for (int j = 0; j < N; j++) values.at[j] = __uint_as_float(0x7fc00000u);
        }
        ((Elements*)to)[i] = values;
    }
}

extern "C" __global__ void lookup(const float* table, const u32* numbers, float* to, u64 n, u32 codes, u32 dim) {
    lookup_rows<1>(table, numbers, to, n, codes, dim);
}

extern "C" __global__ void lookup_grouped(const float* table, const u32* numbers, float* to, u64 n, u32 codes,
                                          u32 dim) {
    lookup_rows<4>(table, numbers, to, n, codes, dim);
}

// The largest |z| that is a number, as bits: they are in the order of what they mean.
extern "C" __global__ void largest(const float* z, u32* bits, u64 n) {
    __shared__ u32 most[256];
    u32 own = 0;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        u32 x = __float_as_uint(z[i]) & 0x7fffffffu;
        if (x < 0x7f800000u && x > own) own = x;
    }
    most[threadIdx.x] = own;
    for (u32 width = 128; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width && most[threadIdx.x + width] > most[threadIdx.x]) most[threadIdx.x] = most[threadIdx.x + width];
    }
    if (threadIdx.x == 0) atomicMax(bits, most[0]);
}

// 2ᵏ, such that numbers up to the largest times it are below 2^digits.
__device__ inline double unit(u32 largest, int digits) { return ldexp(1., digits - ((int)(largest >> 23) - 126)); }

#define RUN 8  // vectors that a thread takes one after the other

// Adds the vectors of each code, as integers: so that the sums are the same in whatever order they are added.
// Neighbours of one code are added up first. Codes that are out of range count for nothing. All is 0 before;
// `is_unclean` is not after something that is no number was added.
extern "C" __global__ void add_vectors(const float* z, const u32* assigned, const u32* largest, u64* sums,
                                       u32* counts, u32* is_unclean, u32 count, u32 codes, u32 dim, int digits) {
    const double scale = unit(*largest, digits);
    const u64 n = (u64)(count + RUN - 1) / RUN * dim;
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        const u32 d = i % dim, first = i / dim * RUN;
        u32 code[RUN];
        float value[RUN];
        #pragma unroll
        for (u32 j = 0; j < RUN; j++) {
            const u32 row = first + j < count ? first + j : count - 1;
            code[j] = assigned[row];
            value[j] = z[(u64)row * dim + d];
        }
        long long sum = 0;
        u32 own = NONE, run = 0;
        #pragma unroll
        for (u32 j = 0; j <= RUN; j++) {
            const u32 next = j < RUN && first + j < count ? code[j < RUN ? j : 0] : NONE;
            if (next != own) {
                if (own < codes) {
                    atomicAdd(sums + (u64)own * dim + d, (u64)sum);
                    if (d == 0) atomicAdd(counts + own, run);
                }
                own = next;
                sum = 0;
                run = 0;
            }
            if (j < RUN && next < codes) {
                if (is_finite(value[j])) sum += (long long)rint((double)value[j] * scale);
                else *is_unclean = 1;
                run++;
            }
        }
    }
}

// The sums [codes][dim] and then the counts [codes] as f32. Where the sums are unclean, none of them is a number.
extern "C" __global__ void code_statistics(const u64* sums, const u32* counts, const u32* largest,
                                           const u32* is_unclean, float* to, u64 n, u32 codes, int digits) {
    const double scale = *is_unclean ? (double)__uint_as_float(0x7fc00000u) : 1. / unit(*largest, digits);
    for (u64 i = thread_number(); i < n + codes; i += thread_count()) {
        to[i] = i < n ? (float)((double)(long long)sums[i] * scale) : (float)counts[i - n];
    }
}

#define BINS 4096

// How often each code was chosen: of `codebooks` codebooks in turn, [codebooks][codes]. 0 before.
extern "C" __global__ void count_codes(const u32* assigned, u32* counts, u64 n, u32 codebooks, u32 codes) {
    __shared__ u32 bins[BINS];
    const u32 all = codebooks * codes;
    const bool is_shared = all <= BINS;
    if (is_shared) {
        for (u32 i = threadIdx.x; i < all; i += blockDim.x) bins[i] = 0;
        __syncthreads();
    }
    for (u64 i = thread_number(); i < n; i += thread_count()) {
        const u32 code = assigned[i], bin = (u32)(i % codebooks) * codes + code;
        if (code >= codes) continue;
        if (is_shared) atomicAdd(bins + bin, 1u);
        else atomicAdd(counts + bin, 1u);
    }
    if (!is_shared) return;
    __syncthreads();
    for (u32 i = threadIdx.x; i < all; i += blockDim.x) {
        if (bins[i] > 0) atomicAdd(counts + i, bins[i]);
    }
}

// The factor of moving averages in step t: `decay`, and at most t/(t + warmup).
__device__ inline float decay_in(const u32* step, double decay, double warmup) {
    double t = *step < 1 ? 1. : (double)*step;
    double most = t / (t + warmup);
    return (float)(most < decay ? most : decay);
}

// N = dN + (1 - d)n, and the sum of N. One block; threads: 256.
extern "C" __global__ void average_usage(const float* counts, float* usage, float* total, const u32* step,
                                         double decay, double warmup, u32 codes) {
    const float d = decay_in(step, decay, warmup);
    double sum = 0.;
    for (u32 k = threadIdx.x; k < codes; k += 256) {
        float n = d * usage[k] + (1.f - d) * counts[k];
        usage[k] = n;
        sum += n;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) total[0] = (float)sum;
}

// m = dm + (1 - d)s and, of codes that were chosen, e = m/((N + epsilon)/(total + codes·epsilon)·total), of
// length 1 if `is_cosine`. One block of 32 threads per code.
extern "C" __global__ void average_codebook(const float* counts, const float* sums, const float* usage,
                                            const float* total, float* averaged, float* codebook,
                                            const u32* step, double decay, double warmup, double epsilon,
                                            u32 codes, u32 dim, u32 is_cosine) {
    __shared__ float squares[32];
    const u32 lane = threadIdx.x;
    const u64 first = (u64)blockIdx.x * dim;
    const float d = decay_in(step, decay, warmup);
    for (u32 i = lane; i < dim; i += 32) {
        averaged[first + i] = d * averaged[first + i] + (1.f - d) * sums[first + i];
    }
    // The same for all threads of the block.
    if (!(counts[blockIdx.x] > 0.f)) return;
    const double all = total[0];
    const float smoothed = (float)((usage[blockIdx.x] + epsilon) * (all / (all + codes * epsilon)));
    float scale = 1.f;
    if (is_cosine) {
        float square = 0.f;
        for (u32 i = lane; i < dim; i += 32) {
            float e = averaged[first + i] / smoothed;
            square += e * e;
        }
        squares[lane] = square;
        __syncthreads();
        float sum = 1e-12f;
        for (u32 i = 0; i < 32; i++) sum += squares[i];
        scale = sqrtf(sum);
    }
    for (u32 i = lane; i < dim; i += 32) codebook[first + i] = averaged[first + i] / smoothed / scale;
}
