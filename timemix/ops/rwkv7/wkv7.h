/* One token of the recurrence wkv7 for one head, whose state S has the size (values, keys).

    u = S a        S' = S diag(d) + u b^T + v k^T        y = S' r            with d = exp(w)

   d is computed as 1 + m with m = exp(w) - 1, because the rounding error of a d near 1 would be equal at every token, and
   add up. Files that include this header are compiled without -fassociative-math, which would replace S + S m by
   S (1 + m). */

#ifndef TIMEMIX_WKV7_H
#define TIMEMIX_WKV7_H

#include "ops/common/types.h"

/* One token: computes next = S' (which may be the array S), u (N,) and y (N,). */
INLINE void wkv7_token(int64_t N, const float *S, float *next, const float *r, const float *m, const float *k,
                       const float *v, const float *a, const float *b, float *u, float *y) {
    for (int64_t i = 0; i < N; i++) {
        const float *row = S + i * N, value = v[i];
        float *new = next + i * N, read = 0, sum = 0;
#pragma omp simd reduction(+ : read)
        for (int64_t j = 0; j < N; j++) read += row[j] * a[j];
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < N; j++) {
            new[j] = row[j] + (row[j] * m[j] + (read * b[j] + value * k[j]));
            sum += new[j] * r[j];
        }
        u[i] = read;
        y[i] = sum;
    }
}

/* With a constant N, the compiler keeps vectors of a row in registers. */
#define WITH_CONSTANT(N, call) \
    switch (N) {               \
    case 64: {                 \
        enum { M = 64 };       \
        call;                  \
        break;                 \
    }                          \
    case 32: {                 \
        enum { M = 32 };       \
        call;                  \
        break;                 \
    }                          \
    default: {                 \
        const int64_t M = N;   \
        call;                  \
    }                          \
    }

#endif
