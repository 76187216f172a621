// What several of the kernels compute with.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

// 2^x for |x| < 120, to 2 units in the last place: plain arithmetic, so that a compiler can do many at once.
ALWAYS_INLINE float exp2_of(float x) {
    float whole = __builtin_floorf(x), f = x - whole;
    float p = 2.161380824e-4f; // least squares in the relative error on [0, 1), 2e-9
    p = p * f + 1.246737638e-3f;
    p = p * f + 9.675532627e-3f;
    p = p * f + 5.548522016e-2f;
    p = p * f + 2.402293251e-1f;
    p = p * f + 6.931470423e-1f;
    p = p * f + 1.0f;
    union { int32_t bits; float value; } power = {((int32_t)whole + 127) << 23};
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

// Sixteen sums side by side, in vectors of GCC and Clang: in the same order on every processor, however long its vectors are.
#define LANES 16
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Chosen __attribute__((vector_size(4 * LANES)));

ALWAYS_INLINE float sum_of(Lanes lanes) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

ALWAYS_INLINE Lanes either(Chosen chosen, Lanes yes, Lanes no) { return (Lanes)((chosen & (Chosen)yes) | (~chosen & (Chosen)no)); }

// Smallest and largest of a run, its sum and that of its squares; the first two NaN where one of its elements is.
ALWAYS_INLINE void statistics_of(const float *restrict x, int64_t count, float *low, float *high, float *sum, float *square) {
    float l = x[0], h = x[0], s = 0, q = 0;
    int64_t i = 0;
    if (count >= LANES) {
        Lanes lows = l - (Lanes){0}, highs = lows, sums = {0}, squares = {0}, v;
        for (; i + LANES <= count; i += LANES) {
            memcpy(&v, x + i, sizeof v);
            lows = either(v < lows, v, lows);
            highs = either(v > highs, v, highs);
            sums += v;
            squares += v * v;
        }
        s = sum_of(sums);
        q = sum_of(squares);
        for (int lane = 0; lane < LANES; lane++) {
            l = lows[lane] < l ? lows[lane] : l;
            h = highs[lane] > h ? highs[lane] : h;
        }
    }
    for (; i < count; i++) {
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

// The range of a run: mean +- span(b) std / 2 within its smallest and largest weight, where `spans` has the span, in standard deviations,
// for 1 to 16 bits; without `spans` from the smallest to the largest weight. It holds zero if `with_zero`, and is symmetric about it, with
// a mean of zero, if `symmetric`.
ALWAYS_INLINE void range_of(const float *restrict x, int64_t count, float bits, const float *spans, int with_zero, int symmetric, float *low,
                            float *high) {
    float l, h, sum, square;
    statistics_of(x, count, &l, &h, &sum, &square);
    if (symmetric) h = -l > h ? -l : h, l = -h;
    if (with_zero) l = l > 0 ? 0 : l, h = h < 0 ? 0 : h;
    if (spans) {
        float mean = symmetric ? 0 : sum / count, variance = square / count - mean * mean;
        float up = bits - 1, whole = up < 0 ? 0 : up > 14 ? 14 : __builtin_floorf(up), part = up - whole;
        part = part < 0 ? 0 : part > 1 ? 1 : part;
        const float *span = spans + (int)whole;
        float reach = __builtin_sqrtf(variance > 0 ? variance : 0) * (span[0] + part * (span[1] - span[0])) / 2;
        if (mean - reach > l) l = mean - reach;
        if (mean + reach < h) h = mean + reach;
        if (with_zero) l = l > 0 ? 0 : l, h = h < 0 ? 0 : h;
    }
    *low = l;
    *high = h;
}
