// Codes of a packed file to weights in one pass: from the bit planes of each class's stream, over the groups of a part in the order of the
// weight, to floats (or to the codes themselves). docs/packed-format.md says what classes, streams, planes and tiles are.
//
// Compiled without contraction of a * b + c, so that every weight is bit by bit what torch's operations make.

#include <string.h>

#include "../../kernels/inline.h"
#include "../../kernels/kernel.h"

typedef struct { // `bits` of each value; byte k holds those of the values k, k + size, k + 2 size, ..., from its low bits up
    const uint8_t *bytes;
    int64_t size;
    int32_t bits, shift; // the plane's first bit in a value
} Plane;

typedef struct {
    const Plane *planes; // of all classes, those of class c from first_plane[c] on
    const int32_t *first_plane;
    const int64_t *counts;  // values of each stream
    int64_t *next;          // value of each stream that comes next
    void *ahead;            // AHEAD values of each stream, unpacked: uint16, or with by_width the weights, float
    int32_t *used, *filled; // those that were taken, those that are there
    const uint8_t *widths;  // of each group: strides of zero share a value
    int64_t width_row, width_group;
    const uint8_t *bins;
    int64_t bin_row;
    const uint16_t *classes; // by width and bin
    int64_t bin_number, rows, columns, block;
    const float *scale, *zero_point, *offset; // of each group or, with by_width (and weights), each width; the last two may be NULL
    const int32_t *centre;
    int64_t row, group, by_width;
    float *weights; // one of these three is not NULL
    uint8_t *codes8;
    uint16_t *codes16;
} Part;

// Vectors of GCC and Clang, which make the most of numbers of 16 bits; a compiler left to itself would take 32.
typedef uint8_t Bytes __attribute__((vector_size(32)));
typedef uint16_t Numbers __attribute__((vector_size(64)));
#define MANY 32

// `count` values of a plane, as far as they lie in consecutive bytes: put at their place, or joined to what is there.
ALWAYS_INLINE void unpack_run(const uint8_t *restrict from, uint16_t *restrict into, int64_t count, int down, int mask, int up, int joins) {
    int64_t i = 0;
    for (; i + MANY <= count; i += MANY) {
        Bytes narrow;
        Numbers there = {0}, found;
        memcpy(&narrow, from + i, sizeof narrow);
        if (joins) memcpy(&there, into + i, sizeof there);
        found = ((__builtin_convertvector(narrow, Numbers) >> (uint16_t)down & (uint16_t)mask) << (uint16_t)up) | there;
        memcpy(into + i, &found, sizeof found);
    }
    for (; i < count; i++) into[i] = (uint16_t)((from[i] >> down & mask) << up | (joins ? into[i] : 0));
}

static void unpack(const Plane *plane, const Plane *end, int64_t first, int64_t count, uint16_t *out) {
    for (int joins = 0; plane < end; plane++, joins = 1) {
        int64_t place = first / plane->size, byte = first % plane->size;
        int mask = (1 << plane->bits) - 1;
        for (int64_t done = 0, run; done < count; done += run, place++, byte = 0) {
            const uint8_t *from = plane->bytes + byte;
            int down = (int)place * plane->bits;
            run = plane->size - byte < count - done ? plane->size - byte : count - done;
            if (joins)
                unpack_run(from, out + done, run, down, mask, plane->shift, 1);
            else
                unpack_run(from, out + done, run, down, mask, plane->shift, 0);
        }
    }
}

// Eight at a time, in the vectors of GCC and Clang: short groups are too short for a loop that a compiler would make vectors of.
typedef uint16_t Codes __attribute__((vector_size(16)));
typedef int32_t Levels __attribute__((vector_size(32)));
typedef float Weights __attribute__((vector_size(32)));
#define WIDE 8

// level = centre + 0, -1, 1, -2, ... mod 2^b; weight = (level - zero_point) * scale or level * scale + offset.
#define LEVEL(code) ((centre + (((code) >> 1) ^ -((code) & 1))) & top)

ALWAYS_INLINE void dequantize(const Part *p, const uint16_t *restrict codes, float *restrict out, int64_t count, int64_t at, int width) {
    int32_t top = (1 << width) - 1, centre = p->centre[at];
    float scale = p->scale[at], zero_point = p->offset ? 0 : p->zero_point[at], offset = p->offset ? p->offset[at] : 0;
    int64_t i = 0;
    for (; i + WIDE <= count; i += WIDE) {
        Codes narrow;
        memcpy(&narrow, codes + i, sizeof narrow);
        Levels code = __builtin_convertvector(narrow, Levels);
        Weights weight = (__builtin_convertvector(LEVEL(code), Weights) - zero_point) * scale;
        if (p->offset) weight += offset;
        memcpy(out + i, &weight, sizeof weight);
    }
    for (; i < count; i++) {
        int32_t code = codes[i];
        float weight = ((float)LEVEL(code) - zero_point) * scale;
        out[i] = p->offset ? weight + offset : weight;
    }
}

// Unpack more values of a class behind those that nobody has taken yet. Where the grid follows from the width they become weights at once,
// in runs that are longer than groups and so faster.
static __attribute__((noinline)) void refill(const Part *p, int64_t class, int width) {
    uint16_t codes[AHEAD];
    const Plane *planes = p->planes + p->first_plane[class], *end = p->planes + p->first_plane[class + 1];
    int64_t rest = p->filled[class] - p->used[class], more = p->counts[class] - p->next[class];
    size_t item = p->by_width ? sizeof(float) : sizeof(uint16_t);
    char *ahead = (char *)p->ahead + (size_t)class * AHEAD * item, *behind = ahead + (size_t)rest * item;
    if (more > AHEAD - rest) more = AHEAD - rest;
    memmove(ahead, ahead + (size_t)p->used[class] * item, (size_t)rest * item);
    unpack(planes, end, p->next[class], more, p->by_width ? codes : (uint16_t *)behind);
    if (p->by_width) dequantize(p, codes, (float *)behind, more, width, width);
    p->next[class] += more;
    p->used[class] = 0;
    p->filled[class] = (int32_t)(rest + more);
}

// Where the next `count` values of a class are, AHEAD or fewer.
ALWAYS_INLINE int64_t take(const Part *p, int64_t class, int32_t count, int width) {
    if (__builtin_expect(p->filled[class] - p->used[class] < count, 0)) refill(p, class, width);
    int64_t found = class * AHEAD + p->used[class];
    p->used[class] += count;
    return found;
}

ALWAYS_INLINE void put(const Part *p, int64_t from, int64_t place, int64_t count, int64_t at, int width) {
    const uint16_t *codes = (const uint16_t *)p->ahead + from;
    if (p->by_width)
        memcpy(p->weights + place, (const float *)p->ahead + from, (size_t)count * sizeof(float));
    else if (p->weights)
        dequantize(p, codes, p->weights + place, count, at, width);
    else if (p->codes8)
        for (int64_t i = 0; i < count; i++) p->codes8[place + i] = (uint8_t)codes[i];
    else
        memcpy(p->codes16 + place, codes, (size_t)count * sizeof(uint16_t));
}

// The groups of `length` columns of every row, from group `first` up to and without `stop`.
ALWAYS_INLINE void unpack_tile(const Part *p, int64_t first, int64_t stop, int64_t length) {
    for (int64_t row = 0; row < p->rows; row++) {
        const uint8_t *widths = p->widths + row * p->width_row;
        const uint16_t *classes = p->classes + p->bins[row * p->bin_row];
        for (int64_t group = first; group < stop; group++) {
            int width = widths[group * p->width_group];
            int64_t class = classes[width * p->bin_number], at = row * p->row + group * p->group;
            int64_t place = row * p->columns + group * p->block;
            for (int64_t done = 0, run; done < length; done += run) {
                run = length - done < AHEAD ? length - done : AHEAD;
                put(p, take(p, class, (int32_t)run, width), place + done, run, at, width);
            }
        }
    }
}

static void unpack_part(const Part *part) {
    Part copy = *part; // in this frame the compiler knows that nothing else points to it
    int64_t whole = copy.columns / copy.block, rest = copy.columns % copy.block;
    switch (copy.block) { // the compiler makes fast code for a length that it knows
    case 4: unpack_tile(&copy, 0, whole, 4); break;
    case 8: unpack_tile(&copy, 0, whole, 8); break;
    case 16: unpack_tile(&copy, 0, whole, 16); break;
    default: unpack_tile(&copy, 0, whole, copy.block);
    }
    if (rest) unpack_tile(&copy, whole, whole + 1, rest);
}

// Add the groups [first, stop) of every row to the count of their width and bin.
static void count_cells(const uint8_t *widths, int64_t width_row, int64_t width_group, const uint8_t *bins, int64_t bin_row,
                          int64_t bin_number, int64_t rows, int64_t first, int64_t stop, int64_t *counts) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t group = first; group < stop; group++)
            counts[widths[row * width_row + group * width_group] * bin_number + bins[row * bin_row]]++;
}

CALL(unpack_part, P(0))
CALL(count_cells, P(0), N(1), N(2), P(3), N(4), N(5), N(6), N(7), N(8), P(9))

TABLE(unpacking) = {{"unpack", "i", call_unpack_part}, {"count_cells", "iiiiiiiiii", call_count_cells}, {0}};
