// How a kernel is called from Python: with numbers, which are addresses of arrays, lengths or settings. No kernel knows of Python or torch.

#pragma once

#include <stdint.h>

_Static_assert(sizeof(void *) == sizeof(uint64_t), "addresses come as 64-bit numbers");

typedef union {
    uint64_t word; // an address, length, seed or flag; None is 0
    double real;
} Argument;

typedef struct {
    const char *name;
    const char *arguments; // one letter each: i for a word, f for a real
    void (*call)(const Argument *);
} Kernel;

#define P(i) ((void *)a[i].word)
#define N(i) ((int64_t)a[i].word)
#define R(i) ((float)a[i].real)
#define CALL(kernel, ...) \
    static void call_##kernel(const Argument *a) { kernel(__VA_ARGS__); }

// Every file of kernels is compiled once for each kind of processor, and has a table of its own for each: see setup.py.
#define JOINED(variant, file) variant##_##file
#define TABLE_OF(variant, file) JOINED(variant, file)
#define TABLE(file) const Kernel TABLE_OF(VARIANT, file)[]

#define PART 16384 // groups whose sums are one result of a kernel: so these do not depend on the number of threads
#define AHEAD 512  // codes of a stream of a packed file that are unpacked at a time: those of all classes stay in the cache
#define KEYS 2048  // 32-bit words of memory whose checksum is one sum
