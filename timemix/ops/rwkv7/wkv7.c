/* The recurrence wkv7 token by token, forward and backward. Each head has a state S of size (values, keys).

    u = S a        S' = S diag(d) + u b^T + v k^T        y = S' r            with d = exp(w), and S = 0 at a reset

   Backward, with dX the gradient of the loss for X, from the last token to the first. dS' begins with the gradient
   that later tokens have for S':

    dS' += dy r^T      dv = dS' k      dk = dS'^T v      du = dS' b      db = dS'^T u      da = S^T du
    dw = d * (sums over the values of S * dS')           dS = dS' diag(d) + du a^T
    dr = S'^T dy = d * (S^T dy) + (u . dy) b + (v . dy) k

   d is computed as 1 + m with m = exp(w) - 1, because the rounding error of a d near 1 would be equal at every token,
   and add up. This file is compiled without -fassociative-math, which would replace S + S m by S (1 + m).

   Layout. Inside this file, S is transposed: (keys N, values P). A row belongs to one key and is a vector over the
   values, padded with zeros to P numbers. So the products with S add up vectors, and need no sum over the elements of
   a vector. Only the backward pass sums over elements, for the five gradients that belong to a key.

   Cost. A token takes about 11 N^2 operations per head forward. For C = 768 channels and N = 64, this is 4 % of the
   24 C^2 operations of the matrix products of a layer.

   The forward pass stores S at the start of every chunk. The backward pass computes the states within a chunk again,
   so memory grows with T / CHUNK. Each task is one head of one sequence, so results are bit-identical for any number
   of threads.

   All numbers are float32. Inputs, y and gradients are (B, T, H, N), states are (B, H, N, N). */

#include "ops/common/exp.h"
#include "ops/common/vectors.h"

#include "ops/common/heads.h"

/* Structures of pointers are passed by value, because gcc loads their pointers in each iteration of a loop otherwise.

   Numbers of one token and one head: m = exp(w) - 1 and the other arguments, u, and y. Each array is (P,), and is
   zero from N on. */
typedef struct {
    float *r, *m, *k, *v, *a, *b, *u, *y;
} wkv7_token;

/* Gradients of the arguments of one token and one head (P,). w is the gradient of log(1 + m). */
typedef struct {
    float *r, *w, *k, *v, *a, *b;
} wkv7_gradients;

/* One token: computes next = S' (which may be the array S), u and y. K vectors of values are computed together. */
INLINE void wkv7_step(const int K, int64_t N, const float *S, float *next, wkv7_token t) {
    const int64_t P = PADDED(N);
    for (int64_t first = 0; first < P; first += K * WIDTH) {
        vec u[BLOCK], y[BLOCK], v[BLOCK];
        for (int n = 0; n < K; n++) {
            u[n] = y[n] = (vec){0};
            v[n] = vector_at(t.v + first + n * WIDTH);
        }
        for (int64_t j = 0; j < N; j++)
            for (int n = 0; n < K; n++) u[n] += vector_at(S + j * P + first + n * WIDTH) * t.a[j];
        for (int64_t j = 0; j < N; j++)
            for (int n = 0; n < K; n++) {
                const int64_t at = j * P + first + n * WIDTH;
                const vec s = vector_at(S + at), new = s + (s * t.m[j] + (u[n] * t.b[j] + v[n] * t.k[j]));
                put_vector(next + at, new);
                y[n] += new * t.r[j];
            }
        for (int n = 0; n < K; n++) {
            put_vector(t.u + first + n * WIDTH, u[n]);
            put_vector(t.y + first + n * WIDTH, y[n]);
        }
    }
}

/* The part of wkv7_step_back that belongs to K vectors of values from `first` on. Adds to S^T dy in g.r, to the sums of
   S * dS' in g.w, and to the gradients of k, a and b. */
INLINE void wkv7_block_back(const int K, int64_t N, int64_t first, const float *S, wkv7_token t, const float *dy,
                            float *dS, wkv7_gradients g) {
    const int64_t P = PADDED(N);
    vec du[BLOCK], dv[BLOCK], out[BLOCK];
    for (int n = 0; n < K; n++) {
        du[n] = dv[n] = (vec){0};
        out[n] = vector_at(dy + first + n * WIDTH);
    }
    for (int64_t j = 0; j < N; j++)
        for (int n = 0; n < K; n++) {
            const vec grad = vector_at(dS + j * P + first + n * WIDTH) + out[n] * t.r[j];
            dv[n] += grad * t.k[j];
            du[n] += grad * t.b[j];
        }
    for (int n = 0; n < K; n++) put_vector(g.v + first + n * WIDTH, dv[n]);
    for (int64_t j = 0; j < N; j++) {
        vec dr = {0}, dw = {0}, dk = {0}, da = {0}, db = {0};
        for (int n = 0; n < K; n++) {
            const int64_t at = j * P + first + n * WIDTH;
            const vec s = vector_at(S + at), grad = vector_at(dS + at) + out[n] * t.r[j];
            dr += s * out[n];
            dw += s * grad;
            da += s * du[n];
            dk += grad * vector_at(t.v + first + n * WIDTH);
            db += grad * vector_at(t.u + first + n * WIDTH);
            put_vector(dS + at, grad + (grad * t.m[j] + du[n] * t.a[j]));
        }
        g.r[j] += total(dr);
        g.w[j] += total(dw);
        g.k[j] += total(dk);
        g.a[j] += total(da);
        g.b[j] += total(db);
    }
}

/* One token backward: dS is the gradient of S' on entry, and of S on return. S is the state before the token. The
   gradients g of the token are overwritten. */
INLINE void wkv7_step_back(const int K, int64_t N, const float *S, wkv7_token t, const float *dy, float *dS,
                           wkv7_gradients g) {
    float reads = 0, values = 0;
#pragma omp simd reduction(+ : reads, values)
    for (int64_t i = 0; i < N; i++) {
        reads += t.u[i] * dy[i];
        values += t.v[i] * dy[i];
        g.r[i] = g.w[i] = g.k[i] = g.a[i] = g.b[i] = 0;
    }
    for (int64_t first = 0; first < PADDED(N); first += K * WIDTH) wkv7_block_back(K, N, first, S, t, dy, dS, g);
#pragma omp simd
    for (int64_t j = 0; j < N; j++) {
        g.w[j] *= 1 + t.m[j];
        g.r[j] += g.r[j] * t.m[j] + (reads * t.b[j] + values * t.k[j]);
    }
}

/* The state of a head between its two layouts: (values N, keys N) outside this file, (keys N, values P) inside. */
INLINE void transpose_in(int64_t N, const float *state, float *S) {
    memset(S, 0, N * PADDED(N) * sizeof(float));
    for (int64_t j = 0; j < N; j++)
        for (int64_t i = 0; i < N; i++) S[j * PADDED(N) + i] = state[i * N + j];
}

INLINE void transpose_out(int64_t N, const float *S, float *state) {
    for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j < N; j++) state[i * N + j] = S[j * PADDED(N) + i];
}

INLINE wkv7_token token_of(head_scratch *s) {
    return (wkv7_token){array_of(s), array_of(s), array_of(s), array_of(s),
                        array_of(s), array_of(s), array_of(s), array_of(s)};
}

INLINE wkv7_gradients gradients_of(head_scratch *s) {
    return (wkv7_gradients){array_of(s), array_of(s), array_of(s), array_of(s), array_of(s), array_of(s)};
}

typedef struct {
    int64_t B, T, H, N;
    const float *r, *w, *k, *v, *a, *b;
    /* resets (B, T), or NULL. */
    const uint8_t *resets;
} wkv7_inputs;

/* Reads the arguments of a token, which begin at `at`. */
INLINE void wkv7_read(wkv7_inputs x, int64_t at, wkv7_token t) {
#pragma omp simd
    for (int64_t j = 0; j < x.N; j++) {
        t.r[j] = x.r[at + j];
        t.m[j] = expm1_series(x.w[at + j]);
        t.k[j] = x.k[at + j];
        t.v[j] = x.v[at + j];
        t.a[j] = x.a[at + j];
        t.b[j] = x.b[at + j];
    }
}

INLINE void wkv7_head(const int K, const wkv7_inputs *x, int64_t row, int64_t head, float *state, float *y,
                      float *starts, float *memory) {
    const int64_t N = x->N, size = N * PADDED(N);
    head_scratch scratch = scratch_of(N, memory);
    const wkv7_token t = token_of(&scratch);
    float *S = scratch.states;
    transpose_in(N, state, S);
    for (int64_t i = 0; i < x->T; i++) {
        const int64_t token = row * x->T + i, at = (token * x->H + head) * N;
        if (starts && i % CHUNK == 0) memcpy(starts + i / CHUNK * size, S, size * sizeof(float));
        if (x->resets && x->resets[token]) memset(S, 0, size * sizeof(float));
        wkv7_read(*x, at, t);
        wkv7_step(K, N, S, S, t);
        memcpy(y + at, t.y, N * sizeof(float));
    }
    transpose_out(N, S, state);
}

INLINE void wkv7_head_back(const int K, const wkv7_inputs *x, int64_t row, int64_t head, const float *starts,
                           const float *dy, float *dstate, const wkv7_gradients *gradients, float *memory) {
    const int64_t N = x->N, size = N * PADDED(N);
    head_scratch scratch = scratch_of(N, memory);
    wkv7_token tokens[CHUNK];
    for (int64_t i = 0; i < CHUNK; i++) tokens[i] = token_of(&scratch);
    const wkv7_gradients g = gradients_of(&scratch);
    float *states = scratch.states, *dS = scratch.dS, *out = array_of(&scratch);
    transpose_in(N, dstate, dS);
    for (int64_t chunk = (x->T - 1) / CHUNK; chunk >= 0; chunk--) {
        const int64_t first = chunk * CHUNK, count = x->T - first < CHUNK ? x->T - first : CHUNK;
        memcpy(states, starts + chunk * size, size * sizeof(float));
        for (int64_t i = 0; i < count; i++) {
            const int64_t token = row * x->T + first + i;
            float *S = states + i * size;
            if (x->resets && x->resets[token]) memset(S, 0, size * sizeof(float));
            wkv7_read(*x, (token * x->H + head) * N, tokens[i]);
            wkv7_step(K, N, S, S + size, tokens[i]);
        }
        for (int64_t i = count - 1; i >= 0; i--) {
            const int64_t token = row * x->T + first + i, at = (token * x->H + head) * N;
            memcpy(out, dy + at, N * sizeof(float));
            wkv7_step_back(K, N, states + i * size, tokens[i], out, dS, g);
            memcpy(gradients->r + at, g.r, N * sizeof(float));
            memcpy(gradients->w + at, g.w, N * sizeof(float));
            memcpy(gradients->k + at, g.k, N * sizeof(float));
            memcpy(gradients->v + at, g.v, N * sizeof(float));
            memcpy(gradients->a + at, g.a, N * sizeof(float));
            memcpy(gradients->b + at, g.b, N * sizeof(float));
            if (x->resets && x->resets[token]) memset(dS, 0, size * sizeof(float));
        }
    }
    transpose_out(N, dS, dstate);
}

/* Computes y. state holds S before the first token on entry, and S after the last token on return. starts (B, H,
   chunks, N, P) is NULL if no gradients are needed. scratch is (threads, SCRATCH(N)). */
void timemix_wkv7(int64_t threads, const wkv7_inputs *x, float *state, float *y, float *starts, float *scratch) {
    const int64_t H = x->H, size = x->N * x->N, stored = CHUNKS(x) * x->N * PADDED(x->N);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++)
        for (int64_t i = FIRST_TASK(x, thread); i < FIRST_TASK(x, thread + 1); i++) {
            float *own = starts ? starts + i * stored : NULL, *memory = scratch + thread * SCRATCH(x->N);
            WITH_CONSTANT(x->N, wkv7_head(K, x, i / H, i % H, state + i * size, y, own, memory))
        }
}

/* Computes the gradients of the inputs. dstate holds the gradient of the last S on entry, and of the first S on
   return. */
void timemix_wkv7_back(int64_t threads, const wkv7_inputs *x, const float *starts, const float *dy, float *dstate,
                       const wkv7_gradients *gradients, float *scratch) {
    const int64_t H = x->H, size = x->N * x->N, stored = CHUNKS(x) * x->N * PADDED(x->N);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++)
        for (int64_t i = FIRST_TASK(x, thread); i < FIRST_TASK(x, thread + 1); i++) {
            float *memory = scratch + thread * SCRATCH(x->N);
            WITH_CONSTANT(x->N, wkv7_head_back(K, x, i / H, i % H, starts + i * stored, dy, dstate + i * size,
                                               gradients, memory))
        }
}
