// Pseudo quantization noise, in one pass over the weights forward and one over their gradient backward.
//
// The noise of weight i is a byte of the 64-bit word i / 8, and a word is a hash of the seed and its own place. So a draw does not depend
// on the number of threads, and the backward makes the same bytes again instead of keeping them.
//
// A weight is O rows of I columns, contiguous; there is one step or logit for each `block` columns of a row.

#include "inline.h"
#include "kernel.h"

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

// How many columns from `left` on are worked on at a time: whole blocks, or a part of one.
static inline int64_t piece(int64_t left, int64_t columns, int64_t block) {
    int64_t most = block > CHUNK ? block - left % block : CHUNK / block * block;
    most = most > CHUNK ? CHUNK : most;
    return columns - left < most ? columns - left : most;
}

static float largest_of(const float *restrict x, int64_t count) {
    float largest = x[0];
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

ALWAYS_INLINE void add_run(const float *restrict weight, const float *restrict noise, float *restrict out, int64_t count, float step) {
    for (int64_t i = 0; i < count; i++) out[i] = weight[i] + step * noise[i];
}

ALWAYS_INLINE float sum_run(const float *restrict grad, const float *restrict noise, int64_t count) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) sum += grad[i] * noise[i];
    return sum;
}

ALWAYS_INLINE void add_blocks(const float *restrict weight, const float *restrict noise, float *restrict out, int64_t count,
                              const float *restrict step, int64_t block) {
    int64_t whole = count / block, done = whole * block;
    for (int64_t b = 0; b < whole; b++) add_run(weight + b * block, noise + b * block, out + b * block, block, step[b]);
    if (done < count) add_run(weight + done, noise + done, out + done, count - done, step[whole]);
}

ALWAYS_INLINE void add_pairs(const float *restrict x, float *restrict sums, int64_t count) {
    for (int64_t i = 0; i < count; i++) sums[i] = x[2 * i] + x[2 * i + 1];
}

ALWAYS_INLINE void sum_blocks(const float *restrict grad, float *restrict noise, float *restrict sums, int64_t count, int64_t block) {
    int64_t whole = count / block, done = whole * block;
    if (block == 4 || block == 8 || block == 16) { // neighbours are added until one is left: faster than to add across each short block
        float half[CHUNK / 2], quarter[CHUNK / 4];
        for (int64_t i = 0; i < done; i++) noise[i] *= grad[i];
        add_pairs(noise, half, done / 2);
        add_pairs(half, block == 4 ? sums : quarter, done / 4);
        if (block == 8) add_pairs(quarter, sums, done / 8);
        if (block == 16) add_pairs(quarter, half, done / 8), add_pairs(half, sums, done / 16);
    } else
        for (int64_t b = 0; b < whole; b++) sums[b] = sum_run(grad + b * block, noise + b * block, block);
    if (done < count) sums[whole] = sum_run(grad + done, noise + done, count - done);
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

static void add_piece(const float *weight, const float *noise, float *out, int64_t count, const float *step, int64_t block) {
    if (block >= count) {
        add_run(weight, noise, out, count, *step);
        return;
    }
#define ADD(B) add_blocks(weight, noise, out, count, step, B)
    FOR_EACH_BLOCK(block, ADD)
}

// The sums of a row's blocks.
static void sum_row(const float *grad, float *sums, int64_t first, int64_t columns, int64_t block, uint64_t seed, const float *table) {
    float noise[CHUNK];
    for (int64_t left = 0, count; left < columns; left += count) {
        count = piece(left, columns, block);
        const float *g = grad + left;
        float *into = sums + left / block;
        draw(noise, first + left, count, seed, table);
        if (block >= count) {
            float sum = sum_run(g, noise, count);
            *into = left % block ? *into + sum : sum;
            continue;
        }
#define SUM(B) sum_blocks(g, noise, into, count, B)
        FOR_EACH_BLOCK(block, SUM)
    }
}

// w + step n. The steps of a row begin at step[row * row_stride]: a stride of zero shares one step.
static void add_noise(const float *weight, const float *step, float *out, int64_t rows, int64_t columns, int64_t block,
                        int64_t row_stride, uint64_t seed, const float *table, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        float noise[CHUNK];
        for (int64_t left = 0, count; left < columns; left += count) {
            int64_t first = row * columns + left;
            count = piece(left, columns, block);
            draw(noise, first, count, seed, table);
            add_piece(weight + first, noise, out + first, count, step + row * row_stride + left / block, block);
        }
    }
}

// Sum of grad * n over each block of each row.
static void reduce_noise(const float *grad, float *sums, int64_t rows, int64_t columns, int64_t block, uint64_t seed, const float *table,
                           int threads) {
    int64_t blocks = (columns + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        sum_row(grad + row * columns, sums + row * blocks, row * columns, columns, block, seed, table);
}

// w + step n with everything that the step is made of: step = span / (2^b - 1) with the bits b = min_bits + sigmoid(gain l) bits_range of each
// block and the length of its range (see range_of), which is kept in `span`: one for each block if `own_ranges`, else one for each row, which
// suits the widest of its blocks. Behind all lengths `span` holds how they grow with the bits.
static void noisy(const float *weight, const float *logits, const float *spans, float *out, float *span, int64_t rows, int64_t columns,
                    int64_t block, int own_ranges, int with_zero, int symmetric, float min_bits, float bits_range, float gain, uint64_t seed,
                    const float *table, int threads) {
    int64_t blocks = (columns + block - 1) / block, ranges = own_ranges ? blocks : 1, range = own_ranges ? block : columns;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *w = weight + row * columns, *l = logits + row * blocks;
        float noise[CHUNK], step[CHUNK], *length = span + row * ranges, *growth = length + rows * ranges;
        for (int64_t r = 0; r < ranges; r++) {
            float widest = own_ranges ? l[r] : largest_of(l, blocks);
            int64_t count = columns - r * range < range ? columns - r * range : range;
            range_of(w + r * range, count, min_bits + bits_range * sigmoid_of(gain * widest), spans, with_zero, symmetric, length + r,
                     growth + r);
        }
        for (int64_t left = 0, count; left < columns; left += count) {
            count = piece(left, columns, block);
            int64_t from = left / block, here = (count + block - 1) / block;
            for (int64_t b = 0; b < here; b++) step[b] = inverse_of(exp2_of(min_bits + bits_range * sigmoid_of(gain * l[from + b])) - 1);
            for (int64_t b = 0; b < here; b++) step[b] *= own_ranges ? length[from + b] : length[0];
            draw(noise, row * columns + left, count, seed, table);
            add_piece(w + left, noise, out + row * columns + left, count, step, block);
        }
    }
}

// d loss / d l = -span ln 2 levels / (levels - 1)^2 db/dl sum(grad n), with levels = 2^b, and what the growth of the range with the bits of
// the widest block adds: all steps of the range are in proportion to it. Of several that are widest each gets its share.
static void noisy_backward(const float *grad, const float *logits, const float *span, float *grad_logits, int64_t rows, int64_t columns,
                             int64_t block, int own_ranges, float min_bits, float bits_range, float gain, uint64_t seed, const float *table,
                             int threads) {
    int64_t blocks = (columns + block - 1) / block;
    float slope = gain * bits_range * 0.69314718f;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        int64_t ranges = own_ranges ? blocks : 1;
        const float *restrict l = logits + row * blocks, *restrict length = span + row * ranges, *restrict growth = length + rows * ranges;
        float *restrict into = grad_logits + row * blocks;
        sum_row(grad + row * columns, into, row * columns, columns, block, seed, table);
        float grown = 0, widest = own_ranges ? 0 : largest_of(l, blocks);
#pragma omp simd reduction(+ : grown)
        for (int64_t b = 0; b < blocks; b++) {
            float share = sigmoid_of(gain * l[b]), levels = exp2_of(min_bits + bits_range * share), under = inverse_of(levels - 1);
            grown += into[b] * under;
            into[b] *= slope * levels * (share * (share - 1)) * (under * under);
            if (own_ranges) into[b] *= 1 - growth[b] * (levels - 1) / levels;
        }
        for (int64_t b = 0; b < blocks; b++) into[b] *= own_ranges ? length[b] : length[0];
        if (own_ranges || growth[0] == 0) continue;
        int64_t equal = 0;
        for (int64_t b = 0; b < blocks; b++) equal += l[b] == widest;
        float share = sigmoid_of(gain * widest), added = grown * growth[0] * length[0] * slope * share * (1 - share) / (equal > 0 ? equal : 1);
        for (int64_t b = 0; b < blocks; b++) into[b] += l[b] == widest ? added : 0;
    }
}

CALL(add_noise, P(0), P(1), P(2), N(3), N(4), N(5), N(6), a[7].word, P(8), N(9))
CALL(reduce_noise, P(0), P(1), N(2), N(3), N(4), a[5].word, P(6), N(7))
CALL(noisy, P(0), P(1), P(2), P(3), P(4), N(5), N(6), N(7), N(8), N(9), N(10), R(11), R(12), R(13), a[14].word, P(15), N(16))
CALL(noisy_backward, P(0), P(1), P(2), P(3), N(4), N(5), N(6), N(7), R(8), R(9), R(10), a[11].word, P(12), N(13))

TABLE(noise) = {
    {"add_noise", "iiiiiiiiii", call_add_noise},
    {"reduce_noise", "iiiiiiii", call_reduce_noise},
    {"noisy", "iiiiiiiiiiifffiii", call_noisy},
    {"noisy_backward", "iiiiiiiifffiii", call_noisy_backward},
    {0},
};
