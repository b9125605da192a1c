/* Number formats of stored values. Arithmetic is always in float32: load() converts to float32, and store() rounds. */

#ifndef TIMEMIX_TYPES_H
#define TIMEMIX_TYPES_H

#include <stdint.h>
#include <string.h>

/* Inlining is forced. As callers pass `type` as a constant, each inner loop is then compiled for one format. */
#define INLINE static inline __attribute__((always_inline))
/* LOCAL marks a function of a header that some including files do not call. */
#define LOCAL static __attribute__((unused))

/* Only weights can be INT8 or INT4 (panels.h). */
enum type { FLOAT32, BFLOAT16, INT8, INT4 };
#define BYTES(type) ((type) == FLOAT32 ? 4 : (type) == BFLOAT16 ? 2 : 1)

typedef union {
    float value;
    uint32_t bits;
} number;

/* x[i] as float32. A bfloat16 is the upper half of a float32. */
INLINE float load(enum type type, const void *x, int64_t i) {
    if (type == FLOAT32) return ((const float *)x)[i];
    return (number){.bits = (uint32_t)((const uint16_t *)x)[i] << 16}.value;
}

/* x[i] = value, rounded to the nearest number of the format, with ties to even. */
INLINE void store(enum type type, void *x, int64_t i, float value) {
    if (type == FLOAT32) {
        ((float *)x)[i] = value;
        return;
    }
    const uint32_t bits = (number){.value = value}.bits;
    /* To round to even, 0x7fff is added, and 1 more if the lowest bit of the upper half is 1. The sum carries into the
       upper half exactly if the number must be rounded up. A NaN could overflow, so the quiet NaN 0x7fc0 is stored. */
    ((uint16_t *)x)[i] = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* The address &x[i], for reading with from() and for writing with into(). */
INLINE const void *from(enum type type, const void *x, int64_t i) { return (const char *)x + i * BYTES(type); }

INLINE void *into(enum type type, void *x, int64_t i) { return (char *)x + i * BYTES(type); }

/* Prefetches x[i] to x[i + n - 1]. Loops backwards in time need prefetching, because some processors do not predict the
   addresses of such loops. */
INLINE void prefetch(enum type type, const void *x, int64_t i, int64_t n) {
    const char *line = from(type, x, i), *end = from(type, x, i + n);
    for (; line < end; line += 64) __builtin_prefetch(line);
}

#endif
