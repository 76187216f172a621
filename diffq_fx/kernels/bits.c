// The bits of all groups, for models with so many groups that this shows: the steps of the grid from the trainable logits, the size of the
// model and its derivative, and the sums from which the pressure on the size is made. b = min_bits + sigmoid(gain l) bits_range.
//
// `values` is how many stored values take a group's width; a stride of zero shares one number.

#include <stdint.h>

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

#define LOG2_E 1.44269504f

ALWAYS_INLINE float sigmoid_of(float x) {
    x = x > 80 ? 80 : x < -80 ? -80 : x;
    return 1 / (1 + exp2_of(-x * LOG2_E));
}

// step = span / (2^b - 1). Strides of zero share a value.
void diffq_fx_steps(const float *logits, const float *span, float *step, int64_t rows, int64_t columns, int64_t span_row_stride,
                    int64_t span_column_stride, float min_bits, float bits_range, float gain, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *l = logits + row * columns, *s = span + row * span_row_stride;
        float *restrict out = step + row * columns;
        if (span_column_stride == 0)
            for (int64_t c = 0; c < columns; c++) out[c] = s[0] / (exp2_of(min_bits + bits_range * sigmoid_of(gain * l[c])) - 1);
        else
            for (int64_t c = 0; c < columns; c++) out[c] = s[c] / (exp2_of(min_bits + bits_range * sigmoid_of(gain * l[c])) - 1);
    }
}

// d loss / d l from d loss / d step: step * -ln 2 * levels / (levels - 1) * db/dl.
void diffq_fx_steps_backward(const float *grad, const float *logits, const float *step, float *grad_logits, int64_t count, float min_bits,
                             float bits_range, float gain, int threads) {
    float slope = gain * bits_range * 0.69314718f;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        float share = sigmoid_of(gain * logits[i]), levels = exp2_of(min_bits + bits_range * share);
        grad_logits[i] = grad[i] * step[i] * levels / (levels - 1) * share * (share - 1) * slope;
    }
}

// b and db/dl.
void diffq_fx_bits(const float *logits, float *bits, float *slope, int64_t count, float min_bits, float bits_range, float gain, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        float share = sigmoid_of(gain * logits[i]);
        bits[i] = min_bits + bits_range * share;
        slope[i] = gain * bits_range * share * (1 - share);
    }
}

#define PART 16384 // groups whose sums are one result: so these do not depend on the number of threads
#define RUN 512    // groups that are summed in single precision

ALWAYS_INLINE void size_of(const float *restrict logits, const float *restrict values, int64_t stride, int64_t count, float min_bits,
                           float bits_range, float gain, double *sums) {
    for (int64_t left = 0; left < count; left += RUN) {
        int64_t end = left + RUN < count ? left + RUN : count;
        float size = 0, growth = 0;
        for (int64_t i = left; i < end; i++) {
            float share = sigmoid_of(gain * logits[i]), n = values[i * stride];
            size += n * (min_bits + bits_range * share);
            growth += n * (share * (1 - share));
        }
        sums[0] += size;
        sums[1] += growth * (gain * bits_range);
    }
}

// parts has two elements for each PART of the groups: the sum of values * b, and that of values * db/dl.
void diffq_fx_size(const float *logits, const float *values, int64_t stride, double *parts, int64_t count, float min_bits, float bits_range,
                   float gain, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t left = 0; left < count; left += PART) {
        int64_t here = left + PART < count ? PART : count - left;
        double *sums = parts + left / PART * 2;
        sums[0] = sums[1] = 0;
        if (stride == 0)
            size_of(logits + left, values, 0, here, min_bits, bits_range, gain, sums);
        else
            size_of(logits + left, values + left, 1, here, min_bits, bits_range, gain, sums);
    }
}

// slope = values * db/dl
void diffq_fx_slope_of_size(const float *logits, const float *values, int64_t stride, float *restrict slope, int64_t count, float bits_range,
                            float gain, int threads) {
    float factor = gain * bits_range;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t left = 0; left < count; left += PART) {
        int64_t end = left + PART < count ? left + PART : count;
        float shared = factor * values[0];
        if (stride == 0)
            for (int64_t i = left; i < end; i++) {
                float share = sigmoid_of(gain * logits[i]);
                slope[i] = shared * (share * (1 - share));
            }
        else
            for (int64_t i = left; i < end; i++) {
                float share = sigmoid_of(gain * logits[i]);
                slope[i] = factor * values[i] * (share * (1 - share));
            }
    }
}

// parts has five elements for each PART of the groups: the sums of g, n, g g, g n and n n.
void diffq_fx_moments(const float *grad, const float *slope, double *parts, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t left = 0; left < count; left += PART) {
        int64_t end = left + PART < count ? left + PART : count;
        double g1 = 0, n1 = 0, gg = 0, gn = 0, nn = 0;
        for (int64_t i = left; i < end; i++) {
            double g = grad[i], n = slope[i];
            g1 += g;
            n1 += n;
            gg += g * g;
            gn += g * n;
            nn += n * n;
        }
        double *sums = parts + left / PART * 5;
        sums[0] = g1, sums[1] = n1, sums[2] = gg, sums[3] = gn, sums[4] = nn;
    }
}
