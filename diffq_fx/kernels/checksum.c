// Whether memory has changed: a number for its bytes, at the speed at which memory can be read.
//
// Each piece of KEYS words is hashed by NH (Black, Halevi, Krawczyk, Krovetz, Rogaway: UMAC, 1999): the sum of (w[0] + k[0]) * (w[1] + k[1])
// over its pairs of 32-bit words. For random keys two pieces have the same sum with a chance of 2^-32 at most, wherever they differ.

#include <string.h>

#include "inline.h"
#include "kernel.h"

#ifdef __AVX2__
#define LANES 8 // what one vector of the processor holds: with longer ones GCC loses its way
#else
#define LANES 4
#endif

#define WORTH_THREADS 8 // pieces

typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint64_t Sums __attribute__((vector_size(4 * LANES)));

// A bijection that moves every bit of its input to all others (splitmix64).
ALWAYS_INLINE uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static uint64_t sum_of_piece(const char *piece, const uint32_t *keys) {
    Sums sums = {0};
    for (int i = 0; i < KEYS; i += LANES) {
        Words words, key;
        memcpy(&words, piece + 4 * i, sizeof words);
        memcpy(&key, keys + i, sizeof key);
        Sums pairs = (Sums)(words + key);
        sums += (pairs & 0xFFFFFFFFu) * (pairs >> 32);
    }
    uint64_t sum = 0;
    for (int lane = 0; lane < LANES / 2; lane++) sum += sums[lane];
    return sum;
}

// `result` moves from the number of what came before to that of it and these bytes.
static void add_bytes(const char *data, int64_t bytes, const uint32_t *keys, uint64_t *result, int threads) {
    int64_t pieces = bytes / (4 * KEYS), rest = bytes - pieces * 4 * KEYS;
    uint64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total) if (threads > 1 && pieces >= WORTH_THREADS)
    for (int64_t i = 0; i < pieces; i++) total += mixed(sum_of_piece(data + i * 4 * KEYS, keys) + mixed(i + 1));
    if (rest) {
        char last[4 * KEYS] = {0};
        memcpy(last, data + bytes - rest, rest);
        total += mixed(sum_of_piece(last, keys) + mixed(pieces + 1));
    }
    *result = mixed(*result + mixed(total + bytes));
}

// Of `arrays` arrays: the address and the bytes of each, and behind them the place of the result.
static void checksum(uint64_t *places, int64_t arrays, const uint32_t *keys, int threads) {
    uint64_t *result = places + 2 * arrays;
    for (int64_t i = 0; i < arrays; i++) add_bytes((const char *)places[2 * i], places[2 * i + 1], keys, result, threads);
}

CALL(checksum, P(0), N(1), P(2), N(3))

TABLE(checksum) = {
    {"checksum", "iiii", call_checksum},
    {0},
};
