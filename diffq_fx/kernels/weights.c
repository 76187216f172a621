// What is done to every weight beside the noise, in one pass over memory each: rounding, the range of each group, the gradient of a range.
//
// A weight is O rows of I columns, contiguous, with one value of a range for each `block` columns of a row.
//
// Compiled without sums in any order and without fused a * b + c: the grids that are found here and the weights on them, which are what
// eval() computes with and files hold, are bit by bit the same on every processor.

#include "inline.h"
#include "kernel.h"

// The nearest value of a grid: (clamp(round(w / scale) + zero_point, 0, top) - zero_point) * scale, where zero_point is a half-integer
// clamp(round(w / scale + 1/2) + zero_point - 1/2, 0, top): the same operations as torch's, so the same bits. scale, zero_point and top have one
// value for each `block` columns of a row; strides of zero share a value.
static void round_to_grid(const float *weight, const float *scale, const float *zero_point, const float *top, float *out, int64_t rows,
                    int64_t columns, int64_t block, int64_t row_stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t left = 0, b = row * row_stride; left < columns; left += block, b++) {
            int64_t end = left + block < columns ? left + block : columns;
            float s = scale[b], z = zero_point[b], t = top[b], half = z - __builtin_floorf(z), base = z - half;
            const float *restrict w = weight + row * columns;
            float *restrict o = out + row * columns;
            for (int64_t i = left; i < end; i++) {
                float q = __builtin_rintf(w[i] / s + half) + base;
                q = q < 0 ? 0 : q > t ? t : q;
                o[i] = (q - z) * s;
            }
        }
}

// Four values for each block of each row: the four results follow each other, each of rows * blocks elements.
static void statistics(const float *weight, float *results, int64_t rows, int64_t columns, int64_t block, int threads) {
    int64_t blocks = (columns + block - 1) / block, all = rows * blocks;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t left = b * block, count = columns - left < block ? columns - left : block;
            float *into = results + row * blocks + b;
            statistics_of(weight + row * columns + left, count, into, into + all, into + 2 * all, into + 3 * all);
        }
}

// Of a weight on a grid whose levels, counted from the zero point, go from `low` to `high`; `half` is 1/2 where they are half-integers.
ALWAYS_INLINE float squared_error(float weight, float inverse, float scale, float half, float low, float high) {
    float level = __builtin_rintf(weight * inverse + half) - half;
    level = level < low ? low : level > high ? high : level;
    float off = level * scale - weight;
    return off * off;
}

// Each weight's error counts `of[i]` times, or once where there is no `of`.
ALWAYS_INLINE float error_in(int lanes, const float *restrict w, const float *restrict of, int64_t count, float scale, float zero_point,
                             float top) {
    float sums[16] = {0}, inverse = 1 / scale, half = zero_point - __builtin_floorf(zero_point), low = -zero_point, high = top - zero_point;
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
#pragma omp simd
        for (int lane = 0; lane < lanes; lane++)
            sums[lane] += squared_error(w[i + lane], inverse, scale, half, low, high) * (of ? of[i + lane] : 1);
    float error = sum_of_lanes(sums, lanes);
    for (; i < count; i++) error += squared_error(w[i], inverse, scale, half, low, high) * (of ? of[i] : 1);
    return error;
}

// Squared rounding error of each block of each row on each of `grids` grids. scale and zero_point have one value for each grid, row and block
// (strides of zero share a value), top one for each row and block; errors is grids x rows x blocks. `importance`, where it is not NULL, says
// how much squared errors count: of each column, where its stride is zero, or of each weight.
static void rounding_errors(const float *weight, const float *importance, const float *scale, const float *zero_point, const float *top,
                            float *errors, int64_t grids, int64_t rows, int64_t columns, int64_t block, int64_t grid_stride,
                            int64_t row_stride, int64_t importance_stride, int threads) {
    int64_t blocks = (columns + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t count = columns - b * block < block ? columns - b * block : block;
            const float *restrict w = weight + row * columns + b * block;
            const float *of = importance ? importance + row * importance_stride + b * block : 0;
            int64_t at = row * row_stride + b;
            for (int64_t g = 0; g < grids; g++) {
                float s = scale[g * grid_stride + at], z = zero_point[g * grid_stride + at], *error = errors + (g * rows + row) * blocks + b;
#define ERROR(LANES) *error = of ? error_in(LANES, w, of, count, s, z, top[at]) : error_in(LANES, w, 0, count, s, z, top[at])
                IN_LANES(count, ERROR);
            }
        }
}

ALWAYS_INLINE float slope_at(float grad, float weight, float rounded, float limit) {
    float error = rounded - weight;
    return grad * (__builtin_fabsf(error) > limit ? rounded : error);
}

ALWAYS_INLINE float slope_in(int lanes, const float *restrict g, const float *restrict w, const float *restrict r, int64_t count, float limit) {
    float sums[16] = {0};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
#pragma omp simd
        for (int lane = 0; lane < lanes; lane++) sums[lane] += slope_at(g[i + lane], w[i + lane], r[i + lane], limit);
    float slope = sum_of_lanes(sums, lanes);
    for (; i < count; i++) slope += slope_at(g[i], w[i], r[i], limit);
    return slope;
}

// Derivative of a loss in the logarithm of each group's range: the sum of grad * (rounded - weight), for weights further than `reach` steps
// from their rounded value, which are clipped, of grad * rounded.
static void range_slope(const float *grad, const float *weight, const float *rounded, const float *scale, float *sums, int64_t rows,
                        int64_t columns, int64_t block, int64_t row_stride, float reach, int threads) {
    int64_t blocks = (columns + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t at = row * columns + b * block, count = columns - b * block < block ? columns - b * block : block;
            float limit = reach * scale[row * row_stride + (row_stride ? b : 0)], *sum = sums + row * blocks + b;
#define SLOPE(LANES) *sum = slope_in(LANES, grad + at, weight + at, rounded + at, count, limit)
            IN_LANES(count, SLOPE);
        }
}

CALL(round_to_grid, P(0), P(1), P(2), P(3), P(4), N(5), N(6), N(7), N(8), N(9))
CALL(statistics, P(0), P(1), N(2), N(3), N(4), N(5))
CALL(rounding_errors, P(0), P(1), P(2), P(3), P(4), P(5), N(6), N(7), N(8), N(9), N(10), N(11), N(12), N(13))
CALL(range_slope, P(0), P(1), P(2), P(3), P(4), N(5), N(6), N(7), N(8), R(9), N(10))

TABLE(weights) = {
    {"round", "iiiiiiiiii", call_round_to_grid},
    {"statistics", "iiiiii", call_statistics},
    {"rounding_errors", "iiiiiiiiiiiiii", call_rounding_errors},
    {"range_slope", "iiiiiiiiifi", call_range_slope},
    {0},
};
