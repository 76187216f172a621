// What is done to every weight at every step, in one pass over memory each: pseudo quantization noise (draw, scale, add), the grouped
// reduction of its backward, the range of each group, rounding.
//
// The noise of weight i is a byte of the 64-bit word i / 8, and a word is a hash of the seed and its own place. So a draw does not depend
// on the number of threads, and the backward makes the same bytes again instead of keeping them.
//
// A weight is O rows of I columns, contiguous; `step` has one value for each `block` columns of a row. Its element for row r and block c
// is step[r * row_stride + c * block_stride]: strides of zero share a value.

#include <math.h>
#include <stdint.h>

#define CHUNK 2048 // weights whose noise is made at a time: it stays in the nearest cache

static inline uint64_t mixed(uint64_t x) { // the finaliser of splitmix64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// Fill noise[0..count) with that of the weights from `first` on, in steps. `table` holds 128 values for Gaussian noise, or is NULL.
static inline void draw(float *restrict noise, int64_t first, int64_t count, uint64_t seed, const float *restrict table) {
    uint64_t words[CHUNK / 8 + 2];
    int64_t word = first / 8, needed = (first + count + 7) / 8 - word;
    for (int64_t i = 0; i < needed; i++)
        words[i] = mixed(seed + (uint64_t)(word + i) * 0x9E3779B97F4A7C15ull) | 0x0101010101010101ull; // odd bytes are symmetric about 0
    const int8_t *from = (const int8_t *)words + (first - word * 8);
    if (table)
        for (int64_t i = 0; i < count; i++) noise[i] = table[(from[i] + 127) >> 1];
    else
        for (int64_t i = 0; i < count; i++) noise[i] = (float)from[i] * (1.0f / 256);
}

#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE void add_run(const float *restrict weight, const float *restrict noise, float *restrict out, int64_t count, float step) {
    for (int64_t i = 0; i < count; i++) out[i] = weight[i] + step * noise[i];
}

ALWAYS_INLINE float sum_run(const float *restrict grad, const float *restrict noise, int64_t count) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) sum += grad[i] * noise[i];
    return sum;
}

// The columns [left, left + count) of a row; left is a multiple of the block.
ALWAYS_INLINE void add_blocks(const float *restrict weight, const float *restrict noise, float *restrict out, int64_t count,
                              const float *restrict step, int64_t stride, int64_t block) {
    int64_t whole = count / block;
    for (int64_t b = 0; b < whole; b++) add_run(weight + b * block, noise + b * block, out + b * block, block, step[b * stride]);
    if (whole * block < count)
        add_run(weight + whole * block, noise + whole * block, out + whole * block, count - whole * block, step[whole * stride]);
}

ALWAYS_INLINE void sum_blocks(const float *restrict grad, const float *restrict noise, float *restrict sums, int64_t count, int64_t block) {
    int64_t whole = count / block;
    for (int64_t b = 0; b < whole; b++) sums[b] = sum_run(grad + b * block, noise + b * block, block);
    if (whole * block < count) sums[whole] = sum_run(grad + whole * block, noise + whole * block, count - whole * block);
}

// The compiler makes a fast loop of each block length that it knows.
#define FOR_EACH_BLOCK(block, CALL) \
    switch (block) {                \
    case 1: CALL(1); break;         \
    case 4: CALL(4); break;         \
    case 8: CALL(8); break;         \
    case 16: CALL(16); break;       \
    case 32: CALL(32); break;       \
    case 64: CALL(64); break;       \
    default: CALL(block);           \
    }

void diffq_fx_add_noise(const float *weight, const float *step, float *out, int64_t rows, int64_t columns, int64_t block,
                        int64_t row_stride, int64_t block_stride, uint64_t seed, const float *table, int threads) {
    int64_t chunk = block >= CHUNK ? CHUNK : CHUNK / block * block;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        float noise[CHUNK];
        for (int64_t left = 0; left < columns; left += chunk) {
            int64_t count = columns - left < chunk ? columns - left : chunk, first = row * columns + left;
            const float *steps = step + row * row_stride + left / block * block_stride;
            draw(noise, first, count, seed, table);
            if (block >= CHUNK) {
                for (int64_t done = 0, run; done < count; done += run, steps += block_stride) { // a chunk may straddle two blocks
                    run = block - (left + done) % block;
                    if (run > count - done) run = count - done;
                    add_run(weight + first + done, noise + done, out + first + done, run, *steps);
                }
            } else {
#define ADD(B) add_blocks(weight + first, noise, out + first, count, steps, block_stride, B)
                FOR_EACH_BLOCK(block, ADD)
            }
        }
    }
}

// sums has one element for each block of each row.
void diffq_fx_reduce_noise(const float *grad, float *sums, int64_t rows, int64_t columns, int64_t block, uint64_t seed, const float *table,
                           int threads) {
    int64_t blocks = (columns + block - 1) / block, chunk = block >= CHUNK ? CHUNK : CHUNK / block * block;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        float noise[CHUNK];
        float *into = sums + row * blocks;
        if (block >= CHUNK)
            for (int64_t b = 0; b < blocks; b++) into[b] = 0;
        for (int64_t left = 0; left < columns; left += chunk) {
            int64_t count = columns - left < chunk ? columns - left : chunk, first = row * columns + left;
            draw(noise, first, count, seed, table);
            if (block >= CHUNK) {
                for (int64_t done = 0, run; done < count; done += run) {
                    run = block - (left + done) % block;
                    if (run > count - done) run = count - done;
                    into[(left + done) / block] += sum_run(grad + first + done, noise + done, run);
                }
            } else {
#define SUM(B) sum_blocks(grad + first, noise, into + left / block, count, B)
                FOR_EACH_BLOCK(block, SUM)
            }
        }
    }
}

// The nearest value of a grid: (clamp(round(w / scale) + zero_point, 0, top) - zero_point) * scale, the same operations as torch's, so the same
// bits. scale, zero_point and top have one value for each `block` columns of a row; strides of zero share a value.
void diffq_fx_round(const float *weight, const float *scale, const float *zero_point, const float *top, float *out, int64_t rows,
                    int64_t columns, int64_t block, int64_t row_stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t left = 0, b = row * row_stride; left < columns; left += block, b++) {
            int64_t end = left + block < columns ? left + block : columns;
            float s = scale[b], z = zero_point[b], t = top[b];
            const float *restrict w = weight + row * columns;
            float *restrict o = out + row * columns;
            for (int64_t i = left; i < end; i++) {
                float q = __builtin_rintf(w[i] / s) + z;
                q = q < 0 ? 0 : q > t ? t : q;
                o[i] = (q - z) * s;
            }
        }
}

// Smallest and largest of a run, its sum and that of its squares; the first two NaN where one of its elements is.
ALWAYS_INLINE void statistics_of(const float *restrict x, int64_t count, float *low, float *high, float *sum, float *square) {
    float l = x[0], h = x[0], s = 0, q = 0;
#pragma omp simd reduction(min : l) reduction(max : h) reduction(+ : s, q)
    for (int64_t i = 0; i < count; i++) {
        float v = x[i];
        l = v < l ? v : l;
        h = v > h ? v : h;
        s += v;
        q += v * v;
    }
    *low = q != q ? NAN : l;
    *high = q != q ? NAN : h;
    *sum = s;
    *square = q;
}

// Four values for each block of each row: the four results follow each other, each of rows * blocks elements.
void diffq_fx_statistics(const float *weight, float *results, int64_t rows, int64_t columns, int64_t block, int threads) {
    int64_t blocks = (columns + block - 1) / block, all = rows * blocks;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t left = b * block, count = columns - left < block ? columns - left : block;
            float *into = results + row * blocks + b;
            statistics_of(weight + row * columns + left, count, into, into + all, into + 2 * all, into + 3 * all);
        }
}

// Squared rounding error of each block of each row on each of `grids` grids. scale and zero_point have one value for each grid, row and block
// (strides of zero share a value), top one for each row and block; errors is grids x rows x blocks.
void diffq_fx_rounding_errors(const float *weight, const float *scale, const float *zero_point, const float *top, float *errors,
                              int64_t grids, int64_t rows, int64_t columns, int64_t block, int64_t grid_stride, int64_t row_stride,
                              int threads) {
    int64_t blocks = (columns + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t count = columns - b * block < block ? columns - b * block : block;
            const float *restrict w = weight + row * columns + b * block;
            int64_t at = row * row_stride + b;
            for (int64_t g = 0; g < grids; g++) {
                float s = scale[g * grid_stride + at], z = zero_point[g * grid_stride + at], t = top[at], inverse = 1 / s, error = 0;
                for (int64_t i = 0; i < count; i++) {
                    float q = __builtin_rintf(w[i] * inverse) + z;
                    q = q < 0 ? 0 : q > t ? t : q;
                    float off = (q - z) * s - w[i];
                    error += off * off;
                }
                errors[(g * rows + row) * blocks + b] = error;
            }
        }
}

// The range of each block: mean +- span(b) std / 2 within its smallest and largest weight, where `spans` has the span, in standard deviations,
// for 1 to 16 bits. It holds zero if `with_zero`, and is symmetric about it, with a mean of zero, if `symmetric`.
void diffq_fx_normal_range(const float *weight, const float *bits, const float *spans, float *low, float *high, int64_t rows, int64_t columns,
                           int64_t block, int with_zero, int symmetric, int threads) {
    int64_t blocks = (columns + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t left = b * block, count = columns - left < block ? columns - left : block, at = row * blocks + b;
            float l, h, sum, square;
            statistics_of(weight + row * columns + left, count, &l, &h, &sum, &square);
            if (symmetric) h = -l > h ? -l : h, l = -h;
            if (with_zero) l = l > 0 ? 0 : l, h = h < 0 ? 0 : h;
            float mean = symmetric ? 0 : sum / count, variance = square / count - mean * mean;
            float up = bits[at] - 1, whole = up < 0 ? 0 : up > 14 ? 14 : __builtin_floorf(up), part = up - whole;
            part = part < 0 ? 0 : part > 1 ? 1 : part;
            const float *span = spans + (int)whole;
            float reach = __builtin_sqrtf(variance > 0 ? variance : 0) * (span[0] + part * (span[1] - span[0])) / 2;
            if (mean - reach > l) l = mean - reach;
            if (mean + reach < h) h = mean + reach;
            if (with_zero) l = l > 0 ? 0 : l, h = h < 0 ? 0 : h;
            low[at] = l;
            high[at] = h;
        }
}

// Derivative of a loss in the logarithm of each group's range: the sum of grad * (rounded - weight), for weights further than `reach` steps
// from their rounded value, which are clipped, of grad * rounded.
void diffq_fx_range_slope(const float *grad, const float *weight, const float *rounded, const float *scale, float *sums, int64_t rows,
                          int64_t columns, int64_t block, int64_t row_stride, float reach, int threads) {
    int64_t blocks = (columns + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t left = row * columns + b * block, end = b * block + block < columns ? left + block : (row + 1) * columns;
            float limit = reach * scale[row * row_stride + (row_stride ? b : 0)], sum = 0;
            for (int64_t i = left; i < end; i++) {
                float error = rounded[i] - weight[i];
                sum += grad[i] * (__builtin_fabsf(error) > limit ? rounded[i] : error);
            }
            sums[row * blocks + b] = sum;
        }
}
