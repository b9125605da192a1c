/* The recurrence wkv7 for a few tokens of one head, for the decode steps. The kernel for training is wkv7.c.

    u = S a        S' = S diag(d) + u b^T + v k^T        y = S' r            with d = exp(w)

   d is computed as 1 + m with m = exp(w) - 1, because the rounding error of a d near 1 would be equal at every token, and
   add up. A file that includes this header is compiled without -fassociative-math, which would replace S + S m by
   S (1 + m).

   S has the layout of the state, (values, keys). A row of S belongs to one value, and does not depend on the other rows.
   So a few rows stay in registers for all tokens, and the state is read and written once. */

#ifndef TIMEMIX_WKV7_H
#define TIMEMIX_WKV7_H

#include "ops/common/types.h"
#include "ops/common/vectors.h"

/* Rows of S that are computed together. Their sums hide the latency of one another, and they share the vectors of a
   token. The rows fit into the registers for N = 64. */
#define STATE_ROWS (WIDTH == 16 ? 4 : 1)

/* Distance in numbers from the rows in use to the rows that are prefetched. If each text has one token, the states of the
   next heads are still in memory. */
#define NEXT 1024

/* The vectors of T tokens of a head, each (T, N), where m = exp(w) - 1. The result is y. */
typedef struct {
    float *r, *m, *k, *v, *a, *b, *y;
} wkv7_tokens;

/* The rows i to i + STATE_ROWS - 1 of S, which have a constant number of vectors. */
INLINE void wkv7_rows(const int vectors, int64_t i, int64_t T, float *S, const wkv7_tokens *x) {
    const int64_t N = vectors * WIDTH;
    vec row[STATE_ROWS][vectors];
    memcpy(row, S + i * N, sizeof row);
    prefetch(FLOAT32, S, i * N + NEXT, STATE_ROWS * N);
    for (int64_t t = 0; t < T; t++) {
        vec part[STATE_ROWS] = {{0}};
        float u[STATE_ROWS];
        for (int n = 0; n < vectors; n++) {
            const vec a = load_vector(x->a, t * N + n * WIDTH, FLOAT32);
            for (int g = 0; g < STATE_ROWS; g++) part[g] += row[g][n] * a;
        }
        for (int g = 0; g < STATE_ROWS; g++) {
            u[g] = total(part[g]);
            part[g] = (vec){0};
        }
        for (int n = 0; n < vectors; n++) {
            const int64_t at = t * N + n * WIDTH;
            const vec r = load_vector(x->r, at, FLOAT32), m = load_vector(x->m, at, FLOAT32);
            const vec k = load_vector(x->k, at, FLOAT32), b = load_vector(x->b, at, FLOAT32);
            for (int g = 0; g < STATE_ROWS; g++) {
                row[g][n] += row[g][n] * m + (u[g] * b + x->v[t * N + i + g] * k);
                part[g] += row[g][n] * r;
            }
        }
        for (int g = 0; g < STATE_ROWS; g++) x->y[t * N + i + g] = total(part[g]);
    }
    memcpy(S + i * N, row, sizeof row);
}

/* The row i of S, for any N. */
INLINE void wkv7_row(int64_t N, int64_t i, int64_t T, float *S, const wkv7_tokens *x) {
    float *row = S + i * N;
    for (int64_t t = 0; t < T; t++) {
        const float *r = x->r + t * N, *m = x->m + t * N, *k = x->k + t * N, *a = x->a + t * N, *b = x->b + t * N;
        float u = 0, y = 0;
#pragma omp simd reduction(+ : u)
        for (int64_t j = 0; j < N; j++) u += row[j] * a[j];
#pragma omp simd reduction(+ : y)
        for (int64_t j = 0; j < N; j++) {
            row[j] += row[j] * m[j] + (u * b[j] + x->v[t * N + i] * k[j]);
            y += row[j] * r[j];
        }
        x->y[t * N + i] = y;
    }
}

/* Updates S (N, N) by T tokens, and computes y. */
LOCAL void wkv7(int64_t N, int64_t T, float *S, const wkv7_tokens *x) {
    switch (N) {
    case 64:
        for (int64_t i = 0; i < N; i += STATE_ROWS) wkv7_rows(64 / WIDTH, i, T, S, x);
        break;
    case 32:
        for (int64_t i = 0; i < N; i += STATE_ROWS) wkv7_rows(32 / WIDTH, i, T, S, x);
        break;
    default:
        for (int64_t i = 0; i < N; i++) wkv7_row(N, i, T, S, x);
    }
}

#endif
