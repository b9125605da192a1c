/* The recurrence wkv6 token by token, forward and backward. Each head has a state S of size (keys, values).

    y = S^T r + p v      S' = diag(d) S + k v^T        with d = exp(w), p = sum(r u k), and S = 0 at a reset

   Backward, with dX the gradient of the loss for X, from the last token to the first, and q = sum(v dy):

    dr = S dy + q u k        dk = dS' v + q r u        dv = dS'^T k + p dy        du = q r k
    dw = d * (sums over the values of S * dS')         dS = diag(d) dS' + r dy^T

   d S is computed as c S + m S (exp_factors in exp.h).

   Layout. A row of S belongs to one key and is a vector over the values, inside this file padded with zeros to P
   numbers. So the products with S add up vectors, and need no sum over the elements of a vector. Only the backward pass
   sums over elements, for the three gradients that belong to a key.

   The forward pass stores S at the start of every chunk. The backward pass computes the states within a chunk again,
   so memory grows with T / CHUNK. Each task is one head of one sequence, so results are bit-identical for any number
   of threads.

   All numbers are float32. Inputs, y and gradients are (B, T, H, N), states are (B, H, N, N), and u is (H, N). w is
   (B, T, H, N), or (H, N) for decays that are equal at all tokens. */

#include "ops/common/exp.h"
#include "ops/common/vectors.h"

#include "ops/common/heads.h"

/* Structures of pointers are passed by value, because gcc loads their pointers in each iteration of a loop otherwise.

   Numbers of one token and one head. Each array is (P,), and is zero from N on. */
typedef struct {
    float *r, *c, *m, *k, *v, *y;
} wkv6_token;

/* Gradients of the arguments of one token and one head (P,). The gradients of u are added up over tokens. */
typedef struct {
    float *r, *w, *k, *v, *u;
} wkv6_gradients;

INLINE float bonus_of(int64_t N, wkv6_token t, const float *u) {
    float p = 0;
#pragma omp simd reduction(+ : p)
    for (int64_t j = 0; j < N; j++) p += t.r[j] * u[j] * t.k[j];
    return p;
}

/* One token: computes next = S' (which may be the array S) and y. K vectors of values are computed together. */
INLINE void wkv6_step(const int K, int64_t N, const float *u, const float *S, float *next, wkv6_token t) {
    const int64_t P = PADDED(N);
    const float p = bonus_of(N, t, u);
    for (int64_t first = 0; first < P; first += K * WIDTH) {
        vec y[BLOCK], v[BLOCK];
        for (int n = 0; n < K; n++) {
            v[n] = vector_at(t.v + first + n * WIDTH);
            y[n] = v[n] * p;
        }
        for (int64_t j = 0; j < N; j++)
            for (int n = 0; n < K; n++) {
                const int64_t at = j * P + first + n * WIDTH;
                const vec s = vector_at(S + at);
                y[n] += s * t.r[j];
                put_vector(next + at, s * t.c[j] + (s * t.m[j] + v[n] * t.k[j]));
            }
        for (int n = 0; n < K; n++) put_vector(t.y + first + n * WIDTH, y[n]);
    }
}

/* The part of wkv6_step_back that belongs to K vectors of values from `first` on. Adds to S dy in g.r, to the sums of
   S * dS' in g.w, and to dS' v in g.k. */
INLINE void wkv6_block_back(const int K, int64_t N, int64_t first, const float *S, wkv6_token t, const float *dy,
                            float *dS, wkv6_gradients g) {
    const int64_t P = PADDED(N);
    vec dv[BLOCK], out[BLOCK];
    for (int n = 0; n < K; n++) {
        dv[n] = (vec){0};
        out[n] = vector_at(dy + first + n * WIDTH);
    }
    for (int64_t j = 0; j < N; j++) {
        vec dr = {0}, dw = {0}, dk = {0};
        for (int n = 0; n < K; n++) {
            const int64_t at = j * P + first + n * WIDTH;
            const vec s = vector_at(S + at), grad = vector_at(dS + at);
            dr += s * out[n];
            dw += s * grad;
            dk += grad * vector_at(t.v + first + n * WIDTH);
            dv[n] += grad * t.k[j];
            put_vector(dS + at, grad * t.c[j] + (grad * t.m[j] + out[n] * t.r[j]));
        }
        g.r[j] += total(dr);
        g.w[j] += total(dw);
        g.k[j] += total(dk);
    }
    for (int n = 0; n < K; n++) put_vector(g.v + first + n * WIDTH, dv[n]);
}

/* One token backward: dS is the gradient of S' on entry, and of S on return. S is the state before the token. The
   gradients g of the token are overwritten, except that g.u is added to. */
INLINE void wkv6_step_back(const int K, int64_t N, const float *u, const float *S, wkv6_token t, const float *dy,
                           float *dS, wkv6_gradients g) {
    const float p = bonus_of(N, t, u);
    float q = 0;
#pragma omp simd reduction(+ : q)
    for (int64_t i = 0; i < N; i++) {
        q += t.v[i] * dy[i];
        g.r[i] = g.w[i] = g.k[i] = 0;
    }
    for (int64_t first = 0; first < PADDED(N); first += K * WIDTH) wkv6_block_back(K, N, first, S, t, dy, dS, g);
#pragma omp simd
    for (int64_t j = 0; j < N; j++) {
        g.r[j] += q * u[j] * t.k[j];
        g.k[j] += q * u[j] * t.r[j];
        g.v[j] += p * dy[j];
        g.u[j] += q * t.r[j] * t.k[j];
        g.w[j] *= t.c[j] + t.m[j];
    }
}

/* The state of a head between its layouts: (N, N) outside this file, (N, P) inside. */
INLINE void pad_state(int64_t N, const float *state, float *S) {
    memset(S, 0, N * PADDED(N) * sizeof(float));
    for (int64_t j = 0; j < N; j++) memcpy(S + j * PADDED(N), state + j * N, N * sizeof(float));
}

INLINE void unpad_state(int64_t N, const float *S, float *state) {
    for (int64_t j = 0; j < N; j++) memcpy(state + j * N, S + j * PADDED(N), N * sizeof(float));
}

INLINE wkv6_token token_of(head_scratch *s) {
    return (wkv6_token){array_of(s), array_of(s), array_of(s), array_of(s), array_of(s), array_of(s)};
}

INLINE wkv6_gradients gradients_of(head_scratch *s) {
    return (wkv6_gradients){array_of(s), array_of(s), array_of(s), array_of(s), array_of(s)};
}

typedef struct {
    /* fixed: whether w is (H, N). */
    int64_t B, T, H, N, fixed;
    const float *r, *w, *k, *v, *u;
    /* resets (B, T), or NULL. */
    const uint8_t *resets;
} wkv6_inputs;

/* Reads the arguments of a token, which begin at `at`; a fixed decay has been read before the first token. */
INLINE void wkv6_read(wkv6_inputs x, int64_t at, wkv6_token t) {
    if (!x.fixed) exp_factors(x.N, x.w + at, t.c, t.m);
#pragma omp simd
    for (int64_t j = 0; j < x.N; j++) {
        t.r[j] = x.r[at + j];
        t.k[j] = x.k[at + j];
        t.v[j] = x.v[at + j];
    }
}

INLINE void wkv6_head(const int K, const wkv6_inputs *x, int64_t row, int64_t head, float *state, float *y,
                      float *starts, float *memory) {
    const int64_t N = x->N, size = N * PADDED(N);
    head_scratch scratch = scratch_of(N, memory);
    const wkv6_token t = token_of(&scratch);
    float *S = scratch.states;
    pad_state(N, state, S);
    if (x->fixed) exp_factors(N, x->w + head * N, t.c, t.m);
    for (int64_t i = 0; i < x->T; i++) {
        const int64_t token = row * x->T + i, at = (token * x->H + head) * N;
        if (starts && i % CHUNK == 0) memcpy(starts + i / CHUNK * size, S, size * sizeof(float));
        if (x->resets && x->resets[token]) memset(S, 0, size * sizeof(float));
        wkv6_read(*x, at, t);
        wkv6_step(K, N, x->u + head * N, S, S, t);
        memcpy(y + at, t.y, N * sizeof(float));
    }
    unpad_state(N, S, state);
}

/* Computes the tokens of a chunk again: their arguments, and the state before each of them. */
INLINE void repeat_chunk(const int K, const wkv6_inputs *x, int64_t token, int64_t head, int64_t count,
                         const wkv6_token *tokens, float *states) {
    const int64_t N = x->N, size = N * PADDED(N);
    for (int64_t i = 0; i < count; i++) {
        float *S = states + i * size;
        if (x->resets && x->resets[token + i]) memset(S, 0, size * sizeof(float));
        wkv6_read(*x, ((token + i) * x->H + head) * N, tokens[i]);
        wkv6_step(K, N, x->u + head * N, S, S + size, tokens[i]);
    }
}

INLINE void wkv6_head_back(const int K, const wkv6_inputs *x, int64_t row, int64_t head, const float *starts,
                           const float *dy, float *dstate, const wkv6_gradients *gradients, float *memory) {
    const int64_t N = x->N, size = N * PADDED(N), sums = (row * x->H + head) * N;
    const float *u = x->u + head * N;
    head_scratch scratch = scratch_of(N, memory);
    wkv6_token tokens[CHUNK];
    for (int64_t i = 0; i < CHUNK; i++) tokens[i] = token_of(&scratch);
    if (x->fixed)
        for (int64_t i = 0; i < CHUNK; i++) exp_factors(N, x->w + head * N, tokens[i].c, tokens[i].m);
    const wkv6_gradients g = gradients_of(&scratch);
    float *dS = scratch.dS, *out = array_of(&scratch), *dw = gradients->w + sums;
    pad_state(N, dstate, dS);
    if (x->fixed) memset(dw, 0, N * sizeof(float));
    for (int64_t chunk = (x->T - 1) / CHUNK; chunk >= 0; chunk--) {
        const int64_t first = chunk * CHUNK, count = x->T - first < CHUNK ? x->T - first : CHUNK;
        memcpy(scratch.states, starts + chunk * size, size * sizeof(float));
        repeat_chunk(K, x, row * x->T + first, head, count, tokens, scratch.states);
        for (int64_t i = count - 1; i >= 0; i--) {
            const int64_t token = row * x->T + first + i, at = (token * x->H + head) * N;
            memcpy(out, dy + at, N * sizeof(float));
            wkv6_step_back(K, N, u, scratch.states + i * size, tokens[i], out, dS, g);
            memcpy(gradients->r + at, g.r, N * sizeof(float));
            memcpy(gradients->k + at, g.k, N * sizeof(float));
            memcpy(gradients->v + at, g.v, N * sizeof(float));
            if (x->fixed)
                for (int64_t j = 0; j < N; j++) dw[j] += g.w[j];
            else
                memcpy(gradients->w + at, g.w, N * sizeof(float));
            if (x->resets && x->resets[token]) memset(dS, 0, size * sizeof(float));
        }
    }
    memcpy(gradients->u + sums, g.u, N * sizeof(float));
    unpad_state(N, dS, dstate);
}

/* Computes y. state holds S before the first token on entry, and S after the last token on return. starts (B, H,
   chunks, N, P) is NULL if no gradients are needed. scratch is (threads, SCRATCH(N)). */
void timemix_wkv6(int64_t threads, const wkv6_inputs *x, float *state, float *y, float *starts, float *scratch) {
    const int64_t H = x->H, size = x->N * x->N, stored = CHUNKS(x) * x->N * PADDED(x->N);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++)
        for (int64_t i = FIRST_TASK(x, thread); i < FIRST_TASK(x, thread + 1); i++) {
            float *own = starts ? starts + i * stored : NULL, *memory = scratch + thread * SCRATCH(x->N);
            WITH_CONSTANT(x->N, wkv6_head(K, x, i / H, i % H, state + i * size, y, own, memory))
        }
}

/* Computes the gradients of the inputs. The gradient of u, and of a fixed w, is summed over the tokens of each sequence
   (B, H, N). dstate holds the gradient of the last S on entry, and of the first S on return. */
void timemix_wkv6_back(int64_t threads, const wkv6_inputs *x, const float *starts, const float *dy, float *dstate,
                       const wkv6_gradients *gradients, float *scratch) {
    const int64_t H = x->H, size = x->N * x->N, stored = CHUNKS(x) * x->N * PADDED(x->N);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++)
        for (int64_t i = FIRST_TASK(x, thread); i < FIRST_TASK(x, thread + 1); i++) {
            float *memory = scratch + thread * SCRATCH(x->N);
            WITH_CONSTANT(x->N, wkv6_head_back(K, x, i / H, i % H, starts + i * stored, dy, dstate + i * size,
                                               gradients, memory))
        }
}
