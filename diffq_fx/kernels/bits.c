// The bits of all groups, for models with so many groups that this shows: the size of the model and its derivative from the trainable
// logits, and the sums from which the pressure on the size is made. b = min_bits + sigmoid(gain l) bits_range.
//
// `values` is how many stored values take a group's width; a stride of zero shares one number.

#include "inline.h"
#include "kernel.h"

#define RUN 512    // groups that are summed in single precision

ALWAYS_INLINE void size_of(const float *restrict logits, const float *restrict values, int64_t stride, int64_t count, float min_bits,
                           float bits_range, float gain, double *sums) {
    float low = logits[0], high = logits[0];
    sums[0] = sums[1] = 0;
    for (int64_t left = 0; left < count; left += RUN) {
        int64_t end = left + RUN < count ? left + RUN : count;
        float size = 0, growth = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : size, growth)
        for (int64_t i = left; i < end; i++) {
            float l = logits[i], share = sigmoid_of(gain * l), n = values[i * stride];
            size += n * (min_bits + bits_range * share);
            growth += n * (share * (1 - share));
            low = l < low ? l : low;
            high = l > high ? l : high;
        }
        sums[0] += size;
        sums[1] += growth * (gain * bits_range);
    }
    sums[2] = low;
    sums[3] = high;
}

// parts has four elements for each PART of the groups: the sum of values * b, that of values * db/dl, the smallest and the largest logit.
static void size(const float *logits, const float *values, int64_t stride, double *parts, int64_t count, float min_bits, float bits_range,
                   float gain, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t left = 0; left < count; left += PART) {
        int64_t here = left + PART < count ? PART : count - left;
        double *sums = parts + left / PART * 4;
        if (stride == 0)
            size_of(logits + left, values, 0, here, min_bits, bits_range, gain, sums);
        else
            size_of(logits + left, values + left, 1, here, min_bits, bits_range, gain, sums);
    }
}

// slope = times * values * db/dl
static void slope_of_size(const float *logits, const float *values, int64_t stride, float *restrict slope, int64_t count, float times,
                            float bits_range, float gain, int threads) {
    float factor = times * gain * bits_range;
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
static void moments(const float *grad, const float *slope, double *parts, int64_t count, int threads) {
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

CALL(size, P(0), P(1), N(2), P(3), N(4), R(5), R(6), R(7), N(8))
CALL(slope_of_size, P(0), P(1), N(2), P(3), N(4), R(5), R(6), R(7), N(8))
CALL(moments, P(0), P(1), P(2), N(3), N(4))

TABLE(bits) = {
    {"size", "iiiiifffi", call_size},
    {"slope_of_size", "iiiiifffi", call_slope_of_size},
    {"moments", "iiiii", call_moments},
    {0},
};
