/* Parts of the training kernels of recurrences whose state is a matrix per head: sizes, memory and division into tasks.

   Inside the kernels, a state is (keys N, values P), where P is N padded to a multiple of 16. A file that includes this
   header is compiled with CHUNK, the number of tokens between stored states, and ARRAYS, the number of arrays (P,) of a
   thread: for the tokens of a chunk, and for gradients. */

#ifndef TIMEMIX_HEADS_H
#define TIMEMIX_HEADS_H

#include "ops/common/vectors.h"

/* P, for the head size N. */
#define PADDED(N) (((N) + 15) / 16 * 16)

/* Most vectors of values for which the sums of a token are in registers. */
#define BLOCK (64 / WIDTH)

/* Memory of a thread: arrays (P,) for each token of a chunk and for gradients, S before each token of a chunk and
   after the last, and the gradient of S. */
#define SCRATCH(N) (ARRAYS * PADDED(N) + (CHUNK + 2) * (N) * PADDED(N))

typedef struct {
    int64_t P;
    float *free, *states, *dS;
} head_scratch;

INLINE head_scratch scratch_of(int64_t N, float *x) {
    const int64_t P = PADDED(N);
    memset(x, 0, ARRAYS * P * sizeof(float));
    return (head_scratch){P, x, x + ARRAYS * P, x + ARRAYS * P + (CHUNK + 1) * N * P};
}

/* A new array (P,) of zeros. */
INLINE float *array_of(head_scratch *s) {
    float *x = s->free;
    s->free += s->P;
    return x;
}

/* With a constant K, the compiler keeps the sums of a token in registers. K * WIDTH divides P. */
#define WITH_CONSTANT(N, call)       \
    if ((N) % 64 == 0) {             \
        enum { K = BLOCK };          \
        call;                        \
    } else if ((N) % 32 == 0) {      \
        enum { K = BLOCK / 2 };      \
        call;                        \
    } else {                         \
        enum { K = 1 };              \
        call;                        \
    }

/* The first task of a thread. A task is one head of one sequence. */
#define FIRST_TASK(x, thread) ((x)->B * (x)->H * (thread) / threads)
#define CHUNKS(x) (((x)->T + CHUNK - 1) / CHUNK)

#endif
