/* Tokens of the recurrence wkv7 for one head, whose state S has the size (values, keys).

    u = S a        S' = S diag(d) + u b^T + v k^T        y = S' r            with d = exp(w)

   d is computed as 1 + m with m = exp(w) - 1, because the rounding error of a d near 1 would be equal at every token, and
   add up. Files that include this header are compiled without -fassociative-math, which would replace S + S m by
   S (1 + m). */

#ifndef TIMEMIX_WKV7_H
#define TIMEMIX_WKV7_H

#include "ops/common/types.h"
#include "ops/common/vectors.h"

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

/* Rows of S that wkv7_rows() handles together. Each row is independent of the others, so their sums hide the latency of
   one another, and they share the vectors that depend on the token alone. */
#define GROUP (WIDTH == 16 ? 4 : 1)

/* The next GROUP rows of S over T tokens. The rows have a constant number of vectors, and stay in registers. The arrays
   of tokens are (T, N); v and y begin at the first row. */
INLINE void wkv7_rows(const int vectors, int64_t T, float *S, const float *r, const float *m, const float *k,
                      const float *v, const float *a, const float *b, float *y) {
    const int64_t N = vectors * WIDTH;
    vec row[GROUP][vectors];
    memcpy(row, S, sizeof row);
    /* The rows of the next heads are still in memory when a step has one token of each text. */
    prefetch(FLOAT32, S, 4096 / 4, GROUP * N);
    for (int64_t t = 0; t < T; t++) {
        vec part[GROUP] = {{0}};
        float read[GROUP];
        for (int n = 0; n < vectors; n++)
            for (int g = 0; g < GROUP; g++) part[g] += row[g][n] * load_vector(a, t * N + n * WIDTH, FLOAT32);
        for (int g = 0; g < GROUP; g++) {
            read[g] = sum_of(part[g]);
            part[g] = (vec){0};
        }
        for (int n = 0; n < vectors; n++) {
            const int64_t at = t * N + n * WIDTH;
            const vec less = load_vector(m, at, FLOAT32), out = load_vector(r, at, FLOAT32);
            const vec key = load_vector(k, at, FLOAT32), along = load_vector(b, at, FLOAT32);
            for (int g = 0; g < GROUP; g++) {
                row[g][n] += row[g][n] * less + (read[g] * along + v[t * N + g] * key);
                part[g] += row[g][n] * out;
            }
        }
        for (int g = 0; g < GROUP; g++) y[t * N + g] = sum_of(part[g]);
    }
    memcpy(S, row, sizeof row);
}

/* T tokens: updates S, and computes y. All arrays of tokens are (T, N). */
LOCAL void wkv7_tokens(int64_t N, int64_t T, float *S, const float *r, const float *m, const float *k, const float *v,
                       const float *a, const float *b, float *y) {
    if (N == 64)
        for (int64_t i = 0; i < N; i += GROUP) wkv7_rows(64 / WIDTH, T, S + i * N, r, m, k, v + i, a, b, y + i);
    else if (N == 32)
        for (int64_t i = 0; i < N; i += GROUP) wkv7_rows(32 / WIDTH, T, S + i * N, r, m, k, v + i, a, b, y + i);
    else
        for (int64_t at = 0; at < T * N; at += N) {
            float u[N];
            wkv7_token(N, S, S, r + at, m + at, k + at, v + at, a + at, b + at, u, y + at);
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
