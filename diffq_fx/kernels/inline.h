// What several of the kernels compute with.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

// 2^x for |x| < 120, NaN for NaN, to 2 units in the last place: plain arithmetic, so that a compiler can do many at once.
ALWAYS_INLINE float exp2_of(float x) {
    float whole = __builtin_floorf(x), f = x - whole;
    float p = 2.161380824e-4f; // least squares in the relative error on [0, 1), 2e-9
    p = p * f + 1.246737638e-3f;
    p = p * f + 9.675532627e-3f;
    p = p * f + 5.548522016e-2f;
    p = p * f + 2.402293251e-1f;
    p = p * f + 6.931470423e-1f;
    p = p * f + 1.0f;
    union { int32_t bits; float value; } power = {((int32_t)(x == x ? whole : 0) + 127) << 23};
    return p * power.value;
}

// 1 / x for 2^-100 < x < 2^120, to 2 units in the last place: Newton's method takes less time than the division of a vector.
ALWAYS_INLINE float inverse_of(float x) {
    union { float value; int32_t bits; } guess = {x};
    guess.bits = 0x7EF311C7 - guess.bits; // right to 13 %
    float r = guess.value;
    r *= 2 - x * r;
    r *= 2 - x * r;
    return r * (2 - x * r);
}

#define LOG2_E 1.44269504f

ALWAYS_INLINE float sigmoid_of(float x) {
    x = x > 80 ? 80 : x < -80 ? -80 : x;
    return inverse_of(1 + exp2_of(-x * LOG2_E));
}

// Sums are made in lanes side by side, whose number follows from that of the elements: so in the same order on every processor, however
// long its vectors are. `MAKE(n)` does it in n lanes, which the compiler has to know.
#define IN_LANES(count, MAKE)  \
    if ((count) >= 16) MAKE(16); \
    else if ((count) >= 8) MAKE(8); \
    else if ((count) >= 4) MAKE(4); \
    else MAKE(1)

typedef float Four __attribute__((vector_size(16)));

ALWAYS_INLINE Four four_at(const float *x) {
    Four four;
    memcpy(&four, x, sizeof four);
    return four;
}

// The sum of 16, 8, 4 or 1 lanes.
ALWAYS_INLINE float sum_of_lanes(const float *sums, int lanes) {
    Four four;
    if (lanes == 1) return sums[0];
    if (lanes == 16)
        four = (four_at(sums) + four_at(sums + 8)) + (four_at(sums + 4) + four_at(sums + 12));
    else
        four = lanes == 8 ? four_at(sums) + four_at(sums + 4) : four_at(sums);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

ALWAYS_INLINE void statistics_in(int lanes, const float *restrict x, int64_t count, float *low, float *high, float *sum, float *square) {
    float l[16], h[16], s[16] = {0}, q[16] = {0}, smallest = x[0], largest = x[0];
    int64_t i = 0;
    for (int lane = 0; lane < lanes; lane++) l[lane] = h[lane] = x[0];
    for (; i + lanes <= count; i += lanes)
#pragma omp simd
        for (int lane = 0; lane < lanes; lane++) {
            float v = x[i + lane];
            l[lane] = v < l[lane] ? v : l[lane];
            h[lane] = v > h[lane] ? v : h[lane];
            s[lane] += v;
            q[lane] += v * v;
        }
    s[0] = sum_of_lanes(s, lanes);
    q[0] = sum_of_lanes(q, lanes);
#pragma omp simd reduction(min : smallest) reduction(max : largest)
    for (int lane = 0; lane < lanes; lane++) {
        smallest = l[lane] < smallest ? l[lane] : smallest;
        largest = h[lane] > largest ? h[lane] : largest;
    }
    for (; i < count; i++) {
        float v = x[i];
        smallest = v < smallest ? v : smallest;
        largest = v > largest ? v : largest;
        s[0] += v;
        q[0] += v * v;
    }
    *low = q[0] != q[0] ? NAN : smallest;
    *high = q[0] != q[0] ? NAN : largest;
    *sum = s[0];
    *square = q[0];
}

// Smallest and largest of a run, its sum and that of its squares; the first two NaN where one of its elements is.
ALWAYS_INLINE void statistics_of(const float *restrict x, int64_t count, float *low, float *high, float *sum, float *square) {
#define STATISTICS(LANES) statistics_in(LANES, x, count, low, high, sum, square)
    IN_LANES(count, STATISTICS);
}

// The range of a run: mean +- span(b) std / 2 within its smallest and largest weight, where `spans` has the span, in standard deviations,
// for 1 to 16 bits; without `spans` from the smallest to the largest weight. It holds zero if `with_zero`, and is symmetric about it, with
// a mean of zero, if `symmetric`. Its length, and how fast the logarithm of that to base 2 grows with the bits.
ALWAYS_INLINE void range_of(const float *restrict x, int64_t count, float bits, const float *spans, int with_zero, int symmetric,
                            float *length, float *growth) {
    float l, h, sum, square;
    statistics_of(x, count, &l, &h, &sum, &square);
    if (symmetric) h = -l > h ? -l : h, l = -h;
    if (with_zero) l = l > 0 ? 0 : l, h = h < 0 ? 0 : h;
    *growth = 0;
    if (spans) {
        float mean = symmetric ? 0 : sum / count, variance = square / count - mean * mean;
        float up = bits - 1, whole = up > 0 ? up > 14 ? 14 : __builtin_floorf(up) : 0, part = up - whole;
        part = part < 0 ? 0 : part > 1 ? 1 : part;
        const float *span = spans + (int)whole;
        float half_std = __builtin_sqrtf(variance > 0 ? variance : 0) / 2, reach = half_std * (span[0] + part * (span[1] - span[0]));
        int ends = 0; // that move with the bits
        if (mean - reach > l) l = mean - reach, ends += !with_zero || l < 0;
        if (mean + reach < h) h = mean + reach, ends += !with_zero || h > 0;
        if (with_zero) l = l > 0 ? 0 : l, h = h < 0 ? 0 : h;
        if (ends && h > l && up >= 0 && up <= 15) *growth = LOG2_E * ends * half_std * (span[1] - span[0]) / (h - l);
    }
    *length = h - l;
}
