/* The recurrence wkv7 token by token, forward and backward. Each head has a state S of size (values, keys).

    u = S a        S' = S diag(d) + u b^T + v k^T        y = S' r            with d = exp(w), and S = 0 at a reset

   Backward, with dX the gradient of the loss for X, from the last token to the first. dS' begins with the gradient that
   later tokens have for S':

    dS' += dy r^T      dv = dS' k      dk = dS'^T v      du = dS' b      db = dS'^T u      da = S^T du
    dw = d * (sums over the values of S * dS')           dS = dS' diag(d) + du a^T
    dr = S'^T dy = d * (S^T dy) + (u . dy) b + (v . dy) k

   d is computed as 1 + m with m = exp(w) - 1, because the rounding error of a d near 1 would be equal at every token, and
   add up. This file is compiled without -fassociative-math, which would replace S + S m by S (1 + m).

   Cost. A row of S belongs to one value, and is a vector over the keys. The rows do not depend on one another, so a pass
   over S handles one row after another. A token takes about 11 N^2 operations per head forward. For C = 768 channels and
   N = 64, this is 4 % of the 24 C^2 operations of the matrix products of a layer.

   The forward pass stores S at the start of every chunk. The backward pass computes the states within a chunk again, so
   memory grows with T / CHUNK. Each task is one head of one sequence, so results are bit-identical for any number of
   threads.

   All numbers are float32. Inputs, y and gradients are (B, T, H, N), states are (B, H, N, N). */

#include "ops/common/exp.h"

typedef struct {
    int64_t B, T, H, N;
    const float *r, *w, *k, *v, *a, *b;
    /* resets (B, T), or NULL. */
    const uint8_t *resets;
} wkv7_inputs;

typedef struct {
    float *r, *w, *k, *v, *a, *b;
} wkv7_gradients;

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

/* One token backward: dS is the gradient of S' on entry, and of S on return. S is the state before the token. The
   gradients (N,) of the token are overwritten. */
INLINE void wkv7_token_back(int64_t N, const float *S, const float *r, const float *m, const float *k, const float *v,
                            const float *a, const float *b, const float *u, const float *dy, float *dS, float *dr,
                            float *dw, float *dk, float *dv, float *da, float *db) {
    float reads = 0, values = 0;
    for (int64_t j = 0; j < N; j++) dr[j] = dw[j] = dk[j] = da[j] = db[j] = 0;
    for (int64_t i = 0; i < N; i++) {
        const float *row = S + i * N, out = dy[i], value = v[i], read = u[i];
        float *grad = dS + i * N, of_value = 0, of_read = 0;
#pragma omp simd reduction(+ : of_value, of_read)
        for (int64_t j = 0; j < N; j++) {
            grad[j] += out * r[j];
            of_value += grad[j] * k[j];
            of_read += grad[j] * b[j];
        }
#pragma omp simd
        for (int64_t j = 0; j < N; j++) {
            const float g = grad[j];
            dr[j] += row[j] * out;
            dw[j] += g * row[j];
            dk[j] += g * value;
            db[j] += g * read;
            da[j] += row[j] * of_read;
            grad[j] = g + (g * m[j] + of_read * a[j]);
        }
        dv[i] = of_value;
        reads += read * out;
        values += value * out;
    }
    for (int64_t j = 0; j < N; j++) {
        dw[j] *= 1 + m[j];
        dr[j] += dr[j] * m[j] + (reads * b[j] + values * k[j]);
    }
}

INLINE void wkv7_head(int64_t N, const wkv7_inputs *x, int64_t row, int64_t head, float *S, float *y, float *starts) {
    float m[MOST], u[MOST];
    for (int64_t t = 0; t < x->T; t++) {
        const int64_t token = row * x->T + t, at = (token * x->H + head) * N;
        if (starts && t % CHUNK == 0) memcpy(starts + t / CHUNK * N * N, S, N * N * sizeof(float));
        if (x->resets && x->resets[token]) memset(S, 0, N * N * sizeof(float));
        for (int64_t j = 0; j < N; j++) m[j] = expm1_series(x->w[at + j]);
        wkv7_token(N, S, S, x->r + at, m, x->k + at, x->v + at, x->a + at, x->b + at, u, y + at);
    }
}

/* Numbers of the backward pass for a chunk of a head: S before each token and after the last; u and m of each token. */
#define SCRATCH(N) ((CHUNK + 1) * (N) * (N) + 2 * CHUNK * (N))

INLINE void wkv7_head_back(int64_t N, const wkv7_inputs *x, int64_t row, int64_t head, const float *starts,
                           const float *dy, float *dS, const wkv7_gradients *g, float *scratch) {
    const int64_t size = N * N;
    float *states = scratch, *u = states + (CHUNK + 1) * size, *m = u + CHUNK * N, y[MOST];
    for (int64_t chunk = (x->T - 1) / CHUNK; chunk >= 0; chunk--) {
        const int64_t first = chunk * CHUNK, count = x->T - first < CHUNK ? x->T - first : CHUNK;
        memcpy(states, starts + chunk * size, size * sizeof(float));
        for (int64_t i = 0; i < count; i++) {
            const int64_t token = row * x->T + first + i, at = (token * x->H + head) * N;
            float *S = states + i * size;
            if (x->resets && x->resets[token]) memset(S, 0, size * sizeof(float));
            for (int64_t j = 0; j < N; j++) m[i * N + j] = expm1_series(x->w[at + j]);
            wkv7_token(N, S, S + size, x->r + at, m + i * N, x->k + at, x->v + at, x->a + at, x->b + at, u + i * N, y);
        }
        for (int64_t i = count - 1; i >= 0; i--) {
            const int64_t token = row * x->T + first + i, at = (token * x->H + head) * N;
            wkv7_token_back(N, states + i * size, x->r + at, m + i * N, x->k + at, x->v + at, x->a + at, x->b + at,
                            u + i * N, dy + at, dS, g->r + at, g->w + at, g->k + at, g->v + at, g->a + at, g->b + at);
            if (x->resets && x->resets[token]) memset(dS, 0, size * sizeof(float));
        }
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

/* Computes y. state holds S before the first token on entry, and S after the last token on return. starts (B, H, chunks,
   N, N) is NULL if no gradients are needed. */
void timemix_wkv7(int64_t threads, const wkv7_inputs *x, float *state, float *y, float *starts) {
    const int64_t size = x->N * x->N, chunks = (x->T + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < x->B * x->H; task++) {
        float *own = starts ? starts + task * chunks * size : NULL;
        WITH_CONSTANT(x->N, wkv7_head(M, x, task / x->H, task % x->H, state + task * size, y, own))
    }
}

/* Computes the gradients of the inputs. dstate holds the gradient of the last S on entry, and of the first S on return.
   scratch is (B, H, SCRATCH(N)). */
void timemix_wkv7_back(int64_t threads, const wkv7_inputs *x, const float *starts, const float *dy, float *dstate,
                       const wkv7_gradients *gradients, float *scratch) {
    const int64_t size = x->N * x->N, chunks = (x->T + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < x->B * x->H; task++)
        WITH_CONSTANT(x->N, wkv7_head_back(M, x, task / x->H, task % x->H, starts + task * chunks * size, dy,
                                           dstate + task * size, gradients, scratch + task * SCRATCH(x->N)))
}
