// The nearest code of each vector, and what was assigned to each code.

// The codebook's mean: one block per component. Threads: a power of two.
extern "C" __global__ void codebook_mean(const float* codebook, float* mean, u32 codes, u32 dim) {
    __shared__ double sums[256];
    double sum = 0.;
    for (u32 k = threadIdx.x; k < codes; k += blockDim.x) sum += codebook[(u64)k * dim + blockIdx.x];
    sums[threadIdx.x] = sum;
    for (u32 width = blockDim.x / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    }
    if (threadIdx.x == 0) mean[blockIdx.x] = (float)(sums[0] / codes);
}

// ½‖e − mean‖² of every code.
extern "C" __global__ void half_norms(const float* codebook, const float* mean, float* norms, u32 codes,
                                      u32 dim) {
    u32 k = thread_number();
    if (k >= codes) return;
    double sum = 0.;
    for (u32 d = 0; d < dim; d++) {
        double x = codebook[(u64)k * dim + d] - mean[d];
        sum += x * x;
    }
    norms[k] = (float)(0.5 * sum);
}

#define NONE 0xffffffffu
#define INFINITE __uint_as_float(0x7f800000u)
#define ROWS 64    // vectors of a block
#define CODES 64   // codes that they meet at a time
#define DEPTH 16   // components at a time
#define SIDE 16    // a block is SIDE × SIDE threads of 4 × 4 products each

// A score and its code, and the best score of any other code.
struct Best { float score, second; u32 code; };

__device__ inline void take(Best& best, float score, u32 code) {
    if (score < best.score || (score == best.score && code < best.code)) {
        best.second = best.score;
        best.score = score;
        best.code = code;
    } else if (score < best.second) {
        best.second = score;
    }
}

// The nearest code of vector `z` by direct differences in f64, the lowest among ties. All threads of a block.
__device__ u32 nearest_exactly(const float* z, const float* codebook, u32 codes, u32 dim, double* distances,
                               u32* places) {
    double least = (double)INFINITE;
    u32 place = NONE;
    for (u32 k = threadIdx.x; k < codes; k += blockDim.x) {
        double sum = 0.;
        for (u32 d = 0; d < dim; d++) {
            double x = (double)z[d] - (double)codebook[(u64)k * dim + d];
            sum += x * x;
        }
        if (sum < least) { least = sum; place = k; }
    }
    distances[threadIdx.x] = least;
    places[threadIdx.x] = place;
    for (u32 width = blockDim.x / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) {
            u32 other = threadIdx.x + width;
            if (distances[other] < distances[threadIdx.x] ||
                (distances[other] == distances[threadIdx.x] && places[other] < places[threadIdx.x])) {
                distances[threadIdx.x] = distances[other];
                places[threadIdx.x] = places[other];
            }
        }
    }
    __syncthreads();
    u32 found = places[0];
    __syncthreads();
    return found;
}

// argmin_k ½‖e_k − mean‖² − (z − mean)·(e_k − mean) in f32; where the second-best is closer than rounding
// can tell apart, that vector is searched again in f64. A vector that is not finite gets NONE.
extern "C" __global__ void nearest(const float* z, const float* codebook, const float* mean,
                                   const float* norms, u32* found, u32 count, u32 codes, u32 dim) {
    // Padded, so that threads that write one column meet different banks.
    __shared__ float zs[DEPTH][ROWS + 4];
    __shared__ float es[DEPTH][CODES + 4];
    __shared__ Best bests[ROWS][SIDE];
    __shared__ float row_norms[ROWS];
    __shared__ u32 unclear[ROWS];
    __shared__ double distances[SIDE * SIDE];
    __shared__ u32 places[SIDE * SIDE];
    __shared__ float radii[SIDE * SIDE];
    const u32 thread = threadIdx.x, tx = thread % SIDE, ty = thread / SIDE;
    const u32 first = blockIdx.x * ROWS;

    float most = 0.f;
    for (u32 k = thread; k < codes; k += SIDE * SIDE) most = norms[k] > most ? norms[k] : most;
    radii[thread] = most;
    if (thread < ROWS) row_norms[thread] = 0.f;

    Best best[4];
    for (int i = 0; i < 4; i++) { best[i].score = best[i].second = INFINITE; best[i].code = NONE; }
    for (u32 start = 0; start < codes; start += CODES) {
        float products[4][4] = {};
        for (u32 deep = 0; deep < dim; deep += DEPTH) {
            __syncthreads();
            for (u32 i = thread; i < ROWS * DEPTH; i += SIDE * SIDE) {
                u32 d = i % DEPTH, r = i / DEPTH;
                bool is_inside = deep + d < dim;
                float shift = is_inside ? mean[deep + d] : 0.f;
                zs[d][r] = is_inside && first + r < count ? z[(u64)(first + r) * dim + deep + d] - shift : 0.f;
                es[d][r] = is_inside && start + r < codes
                               ? codebook[(u64)(start + r) * dim + deep + d] - shift : 0.f;
            }
            __syncthreads();
            if (start == 0 && thread < ROWS) {
                for (u32 d = 0; d < DEPTH; d++) row_norms[thread] += zs[d][thread] * zs[d][thread];
            }
            for (u32 d = 0; d < DEPTH; d++) {
                float a[4], b[4];
                for (int i = 0; i < 4; i++) { a[i] = zs[d][ty * 4 + i]; b[i] = es[d][tx * 4 + i]; }
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 4; j++) products[i][j] += a[i] * b[j];
            }
        }
        for (int j = 0; j < 4; j++) {
            u32 k = start + tx * 4 + j;
            if (k >= codes) continue;
            float norm = norms[k];
            for (int i = 0; i < 4; i++) take(best[i], norm - products[i][j], k);
        }
    }
    for (int i = 0; i < 4; i++) bests[ty * 4 + i][tx] = best[i];
    for (u32 width = SIDE * SIDE / 2; width > 0; width /= 2) {
        __syncthreads();
        if (thread < width && radii[thread + width] > radii[thread]) radii[thread] = radii[thread + width];
    }
    __syncthreads();
    if (thread < ROWS) {
        Best whole = bests[thread][0];
        for (u32 x = 1; x < SIDE; x++) {
            Best part = bests[thread][x];
            take(whole, part.score, part.code);
            if (part.second < whole.second) whole.second = part.second;
        }
        // Each score is a sum of `dim` rounded products of at most ‖z‖·‖e‖ in all.
        float radius = sqrtf(2.f * radii[0]);
        float rounding = 1.1920929e-7f * (dim + 8.f) * radius * (sqrtf(row_norms[thread]) + radius);
        // False where something is not a number.
        bool is_clear = codes == 1 ? is_finite(whole.score) : whole.second - whole.score > 2.f * rounding;
        unclear[thread] = !is_clear;
        if (first + thread < count) found[first + thread] = whole.code;
    }
    __syncthreads();
    for (u32 r = 0; r < ROWS && first + r < count; r++) {
        if (!unclear[r]) continue;
        u32 code = nearest_exactly(z + (u64)(first + r) * dim, codebook, codes, dim, distances, places);
        if (thread == 0) found[first + r] = code;
    }
}

#define CHUNK 1024  // codes looked at together by 256 threads

// Counts [codes] and sums [codes][dim] of the vectors of each code, added in their order. One block of 256
// threads per code and 256 components (blockIdx.y). Codes that are out of range count for nothing.
extern "C" __global__ void code_statistics(const float* z, const u32* assigned, float* counts, float* sums,
                                           u32 count, u32 codes, u32 dim) {
    __shared__ u32 matches[256];       // of each thread's four
    __shared__ u32 rows[CHUNK];
    __shared__ u32 totals[8];          // of 32 threads each
    const u32 thread = threadIdx.x, code = blockIdx.x, component = blockIdx.y * 256 + thread;
    float sum = 0.f;
    u32 total = 0;
    for (u32 start = 0; start < count; start += CHUNK) {
        u32 own[4], n = 0;
        for (u32 i = 0; i < 4; i++) {
            u32 row = start + thread * 4 + i;
            if (row < count && assigned[row] == code) own[n++] = row;
        }
        matches[thread] = n;
        __syncthreads();
        if (thread < 8) {
            u32 t = 0;
            for (u32 i = 0; i < 32; i++) t += matches[thread * 32 + i];
            totals[thread] = t;
        }
        __syncthreads();
        u32 here = 0;
        for (u32 i = 0; i < 8; i++) here += totals[i];
        if (here > 0) {
            if (n > 0) {
                u32 place = 0;
                for (u32 i = 0; i < thread / 32; i++) place += totals[i];
                for (u32 i = thread / 32 * 32; i < thread; i++) place += matches[i];
                for (u32 i = 0; i < n; i++) rows[place + i] = own[i];
            }
            __syncthreads();
            if (component < dim) {
                for (u32 i = 0; i < here; i++) sum += z[(u64)rows[i] * dim + component];
            }
            total += here;
        }
        __syncthreads();
    }
    if (component < dim) sums[(u64)code * dim + component] = sum;
    if (component == 0) counts[code] = (float)total;
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
    __shared__ double sums[256];
    const float d = decay_in(step, decay, warmup);
    double sum = 0.;
    for (u32 k = threadIdx.x; k < codes; k += 256) {
        float n = d * usage[k] + (1.f - d) * counts[k];
        usage[k] = n;
        sum += n;
    }
    sums[threadIdx.x] = sum;
    for (u32 width = 128; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    }
    if (threadIdx.x == 0) total[0] = (float)sums[0];
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
