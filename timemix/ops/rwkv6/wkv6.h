/* The recurrence wkv6 for a few tokens of one head, for the decode steps. The kernel for training is wkv6.c.

    y = S^T r + p v        S' = diag(d) S + k v^T        with d = exp(w), p = sum(r u k)

   d S is computed as c S + m S (exp_factors in exp.h).

   S has the layout of the state, (keys, values). A row of S belongs to one key, and does not depend on the other rows.
   So a few rows stay in registers for all tokens, and the state is read and written once. */

#ifndef TIMEMIX_WKV6_H
#define TIMEMIX_WKV6_H

#include "ops/common/types.h"
#include "ops/common/vectors.h"

/* Rows of S that are computed together. They share the vectors of v and y, and fit into the registers for N = 64. */
#define STATE_ROWS (WIDTH == 16 ? 4 : 1)

/* Distance in numbers from the rows in use to the rows that are prefetched. If each text has one token, the states of
   the next heads are still in memory. */
#define NEXT 1024

/* The vectors of T tokens of a head, each (T, N). y is p v on entry, and the result on return. */
typedef struct {
    float *r, *c, *m, *k, *v, *y;
} wkv6_tokens;

/* The rows j to j + STATE_ROWS - 1 of S, which have a constant number of vectors. */
INLINE void wkv6_rows(const int vectors, int64_t j, int64_t T, float *S, const wkv6_tokens *x) {
    const int64_t N = vectors * WIDTH;
    vec row[STATE_ROWS][vectors];
    memcpy(row, S + j * N, sizeof row);
    prefetch(FLOAT32, S, j * N + NEXT, STATE_ROWS * N);
    for (int64_t t = 0; t < T; t++)
        for (int n = 0; n < vectors; n++) {
            const int64_t at = t * N + n * WIDTH;
            const vec v = vector_at(x->v + at);
            vec y = vector_at(x->y + at);
            for (int g = 0; g < STATE_ROWS; g++) {
                const int64_t key = t * N + j + g;
                y += row[g][n] * x->r[key];
                row[g][n] = row[g][n] * x->c[key] + (row[g][n] * x->m[key] + v * x->k[key]);
            }
            put_vector(x->y + at, y);
        }
    memcpy(S + j * N, row, sizeof row);
}

/* The row j of S, for any N. */
INLINE void wkv6_row(int64_t N, int64_t j, int64_t T, float *S, const wkv6_tokens *x) {
    float *row = S + j * N;
    for (int64_t t = 0; t < T; t++) {
        const float r = x->r[t * N + j], c = x->c[t * N + j], m = x->m[t * N + j], k = x->k[t * N + j];
        const float *v = x->v + t * N;
        float *y = x->y + t * N;
        for (int64_t i = 0; i < N; i++) {
            y[i] += row[i] * r;
            row[i] = row[i] * c + (row[i] * m + v[i] * k);
        }
    }
}

/* Updates S (N, N) by T tokens, and adds to y. */
LOCAL void wkv6(int64_t N, int64_t T, float *S, const wkv6_tokens *x) {
    switch (N) {
    case 64:
        for (int64_t j = 0; j < N; j += STATE_ROWS) wkv6_rows(64 / WIDTH, j, T, S, x);
        break;
    case 32:
        for (int64_t j = 0; j < N; j += STATE_ROWS) wkv6_rows(32 / WIDTH, j, T, S, x);
        break;
    default:
        for (int64_t j = 0; j < N; j++) wkv6_row(N, j, T, S, x);
    }
}

#endif
