/* The compiled step of models/rwkv1/decode.py. It feeds prompts and new tokens through a whole rwkv1 or rwkv1_exp.

    x = embedding[token]
    for each layer:   z = shift(norm(x));   x += gamma(t) output(sigmoid(R z) wkv(K z, V z))
                      z = shift(norm(x));   x += sigmoid(R' z) output'(act(K' z) V' z)
    logits = head(norm(x))

   A call processes pieces of consecutive tokens (step.h). All rows are multiplied by the weights together (panels.h).
   Only token-shift and time-mix connect the rows of a piece. Weights are float32, bfloat16, int8 or int4
   (panels.h). All other numbers are float32.

   The order in which a number of a row is summed depends only on the position of the row. So each result is
   bit-identical for any division of texts into pieces, and for any other texts, slots or threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "ops/common/activations.h"
#include "ops/common/exp.h"
#include "ops/common/norm.h"
#include "ops/common/panels.h"
#include "ops/common/shift.h"
#include "ops/common/step.h"
#include "ops/common/types.h"

/* Positions whose sums over the tokens before them, `far`, are computed together. */
#define BLOCK 64
/* Number of targets summed at a time: TARGETS independent chains of sums hide the latency of multiply-add. */
#define TARGETS 8

/* Weights and state of a layer. In rwkv1, f_h(lag) is a table. In rwkv1_exp, it is a sum of K exponentials: one token
   later, slot j of the state becomes own[j] S[j] + other[j] S[partner of j], where slots 2i and 2i+1 are partners. */
typedef struct {
    const float *mixer_norm[2], *ffn_norm[2]; /* {weight, bias} (C,) */
    token_shift shift;
    linear key, value, receptance, output, ffn_key, ffn_value, ffn_receptance, ffn_output;
    const float *f;                                  /* (H, history), rwkv1 */
    const float *alpha, *beta, *gamma;               /* (H, positions), (H, positions), (positions,), or NULL for 1 */
    const float *own, *other, *begin, *coefficients; /* (H, K), rwkv1_exp; begin = phi(0) */
    const float *direct, *fade;                      /* (H, M), (H,), rwkv1_exp; fade = rho */
    float *numerators; /* rwkv1 (slots, H, history, N): x of each past position; rwkv1_exp (slots, H, K, N): S */
    float *denominators;            /* (slots, H, N): D */
    float *mixer_shift, *ffn_shift; /* (slots, farthest, C): newest inputs of each sublayer, oldest first */
    float *taps;                    /* (slots, H, M, N), rwkv1_exp: newest x, oldest first */
    float *far;                     /* (slots, H, BLOCK, N), rwkv1: sums over the blocks before the newest one */
} layer;

typedef struct {
    common common;
    int64_t activation, heads, hidden;
    int64_t positions; /* entries of alpha, beta and gamma; the last entry applies to all later positions */
    int64_t history;   /* ctx_len of rwkv1, 0 for rwkv1_exp */
    int64_t modes;     /* K, 0 for rwkv1 */
    int64_t taps;      /* M */
    int64_t *known;    /* (slots,), rwkv1: first position of the block whose sums `far` are stored, -1 for none */
    layer *layer;
} model;

/* Positions of a block, for the shape of `far`. */
int64_t timemix_block(void) { return BLOCK; }

/* x[i] += sigmoid(gate[i]) y[i], i < n. */
static void add_gated(const float *gate, const float *y, int64_t n, float *x) {
    for (int64_t i = 0; i < n; i++) x[i] += sigmoid(gate[i]) * y[i];
}

/* sum[r, n] += sum_{u < length} weights[r - u] history[u, n], for r < targets and n < width; history (length, size),
   sum (targets, size). `weights` points into a curve f: weights[r - u] = f(lag of target r from source u). `width` and
   `targets` are constants, so that the sums stay in registers while history is read once. Each sum is one chain in
   order of u. */
INLINE void look_back(const float *weights, const float *history, int64_t length, int64_t size, const int width,
                      const int targets, float *sum) {
    float held[64];
    for (int n = 0; n < targets * width; n++) held[n] = 0;
    for (int64_t u = 0; u < length; u++)
        for (int r = 0; r < targets; r++)
            for (int n = 0; n < width; n++) held[r * width + n] += weights[r - u] * history[u * size + n];
    for (int r = 0; r < targets; r++)
        for (int n = 0; n < width; n++) sum[r * size + n] += held[r * width + n];
}

/* look_back for TARGETS targets and WIDTH numbers, with explicit vectors: compilers do not vectorize its loops. */
static void look_back_vectors(const float *weights, const float *history, int64_t length, int64_t size, float *sum) {
    vec held[TARGETS] = {{0}};
    for (int64_t u = 0; u < length; u++) {
        vec x;
        memcpy(&x, history + u * size, sizeof x);
        for (int r = 0; r < TARGETS; r++) held[r] += weights[r - u] * x;
    }
    for (int r = 0; r < TARGETS; r++)
        for (int n = 0; n < WIDTH; n++) sum[r * size + n] += held[r][n];
}

/* look_back for all n < size and any number of targets. */
static void look_back_all(const float *weights, const float *history, int64_t length, int64_t size, int64_t targets,
                          float *sum) {
    int64_t r = 0;
    for (; r + TARGETS <= targets; r += TARGETS) {
        int64_t n = 0;
        for (; n + WIDTH <= size; n += WIDTH)
            look_back_vectors(weights + r, history + n, length, size, sum + r * size + n);
        for (; n + 4 <= size; n += 4) look_back(weights + r, history + n, length, size, 4, TARGETS, sum + r * size + n);
        for (; n < size; n++) look_back(weights + r, history + n, length, size, 1, TARGETS, sum + r * size + n);
    }
    for (; r < targets; r++) {
        int64_t n = 0;
        for (; n + 64 <= size; n += 64) look_back(weights + r, history + n, length, size, 64, 1, sum + r * size + n);
        for (; n + 32 <= size; n += 32) look_back(weights + r, history + n, length, size, 32, 1, sum + r * size + n);
        for (; n + 16 <= size; n += 16) look_back(weights + r, history + n, length, size, 16, 1, sum + r * size + n);
        for (; n + 4 <= size; n += 4) look_back(weights + r, history + n, length, size, 4, 1, sum + r * size + n);
        for (; n < size; n++) look_back(weights + r, history + n, length, size, 1, 1, sum + r * size + n);
    }
}

/* Index of a position in alpha, beta and gamma, whose last entry applies to all later positions. */
static inline int64_t entry(const model *m, int64_t position) {
    return position < m->positions ? position : m->positions - 1;
}

/* y (N,) = wkv of one head of one text at t = position, from its key and value (N,); updates the state. Per channel,
   with x[t] = alpha(t) exp(k[t]) v[t], k clamped to [-60, 30]:

    D[t] = rho D[t-1] + exp(k[t]),   wkv[t] = beta(t) numerator[t] / D[t]

    rwkv1:      numerator[t] = far[t] + sum_{start<=u<=t} f(t-u) x[u],   far[t] = sum_{u<start} f(t-u) x[u],   rho = 1
    rwkv1_exp:  S_j[t] = rho (own_j S_j[t-1] + other_j S_partner[t-1]) + phi_j(0) x[t]
                numerator[t] = sum_j coefficients_j S_j[t] + sum_{lag<M} direct(lag) rho^lag x[t-lag]

   rho = exp(-forget) from position ctx_len on, else 1. start, a multiple of BLOCK, is the first position of the block
   of t. far is computed for a whole block at once, as a product of many sources and many targets, which reads the
   history once. `begin`: far is not computed yet for the block of t. */
static void time_mix(const model *m, const layer *l, int64_t row, int64_t h, int64_t position, int begin,
                     const float *key, const float *value, float *y) {
    const int64_t N = m->common.channels / m->heads, K = m->modes, M = m->taps;
    const int64_t at = h * m->positions + entry(m, position);
    const float alpha = l->alpha ? l->alpha[at] : 1, beta = l->beta ? l->beta[at] : 1;
    const float fade = l->fade && position >= m->positions - 1 ? l->fade[h] : 1;
    float *total = l->denominators + (row * m->heads + h) * N;
    float exp_k[N], source[N];
    for (int64_t n = 0; n < N; n++) {
        exp_k[n] = expf(fminf(fmaxf(key[n], -60), 30));
        source[n] = alpha * exp_k[n] * value[n];
        y[n] = 0;
        total[n] = fade * total[n] + exp_k[n];
    }
    if (l->f) {
        float *history = l->numerators + (row * m->heads + h) * m->history * N;
        memcpy(history + position * N, source, N * sizeof(float));
        const float *f = l->f + h * m->history;
        const int64_t start = position - position % BLOCK;
        float *far = l->far + (row * m->heads + h) * BLOCK * N;
        if (begin) {
            const int64_t targets = m->history - start < BLOCK ? m->history - start : BLOCK;
            memset(far, 0, BLOCK * N * sizeof(float));
            look_back_all(f + start, history, start, N, targets, far);
        }
        memcpy(y, far + (position - start) * N, N * sizeof(float));
        look_back_all(f + position - start, history + start * N, position + 1 - start, N, 1, y);
    }
    /* Two slots at a time, since partners need each other's old value. If K is odd, the last slot has no partner
       (other = 0). */
    for (int64_t j = 0; j < K; j += 2) {
        float *a = l->numerators + ((row * m->heads + h) * K + j) * N, *b = j + 1 < K ? a + N : a;
        const int64_t s = h * K + j, t = j + 1 < K ? s + 1 : s;
        for (int64_t n = 0; n < N; n++) {
            const float p = fade * (l->own[s] * a[n] + l->other[s] * b[n]) + l->begin[s] * source[n];
            const float q = fade * (l->own[t] * b[n] + l->other[t] * a[n]) + l->begin[t] * source[n];
            y[n] += l->coefficients[s] * p + (t == s ? 0 : l->coefficients[t] * q);
            b[n] = q;
            a[n] = p;
        }
    }
    float *newest = l->taps + (row * m->heads + h) * M * N;
    /* The loop runs from the oldest entry to the newest, so that each entry is read before it is overwritten. */
    for (int64_t lag = M; lag-- > 0;)
        for (int64_t n = 0; n < N; n++) {
            float *x = newest + (M - 1 - lag) * N + n;
            *x = lag == 0 ? source[n] : fade * x[N];
            y[n] += l->direct[h * M + lag] * *x;
        }
    for (int64_t n = 0; n < N; n++) y[n] = beta * y[n] / total[n];
}

/* Numbers per row for k, v, r side by side: (3, C) in time-mix, (2, F) and (C) in channel-mix. */
static int64_t inner(const model *m) {
    const int64_t C = m->common.channels, F = m->hidden;
    return 3 * C > 2 * F + C ? 3 * C : 2 * F + C;
}

/* Numbers per row for `mixed`: (C) in time-mix, (F) in channel-mix. */
static int64_t wide(const model *m) { return m->common.channels > m->hidden ? m->common.channels : m->hidden; }

/* Size of the scratch memory of timemix_step, in numbers. */
int64_t timemix_scratch(const model *m, int64_t rows, int64_t pieces) {
    const int64_t C = m->common.channels;
    int64_t farthest = 0;
    for (int64_t n = 0; n < m->common.layers; n++)
        if (m->layer[n].shift.farthest > farthest) farthest = m->layer[n].shift.farthest;
    return rows * (3 * C + inner(m) + wide(m)) + pieces * farthest * C;
}

/* logits (outputs, V) after the wanted rows of some pieces. The formula is at the top of this file. scratch has
   timemix_scratch() numbers. Returns NONE, or a fault before anything is written. */
int timemix_step(const model *m, const batch *b, float *logits, float *scratch) {
    const enum fault fault = check(&m->common, b);
    if (fault != NONE) return fault;
    const int64_t *slot = b->slot, *first = b->first, *position = b->position;
    const int64_t pieces = b->pieces, rows = first[pieces];
    const int64_t C = m->common.channels, F = m->hidden, H = m->heads, N = C / H;
    const float epsilon = m->common.epsilon;
    /* scratch: x (rows, C), in (rows, C), then k, v, r, then mixed (rows, C) or (rows, F), then the lines of
       norm_shift. */
    float *x = scratch, *in = x + rows * C, *k = in + rows * C, *mixed = k + rows * inner(m);
    float *lines = mixed + rows * wide(m);
    /* The whole step is one parallel region: starting a region costs as much as a small product. Each `omp for` ends in
       a barrier; multiply() does not. */
#pragma omp parallel num_threads(m->common.threads)
    {
        embed(&m->common, b, x);
        for (int64_t n = 0; n < m->common.layers; n++) {
            const layer *l = m->layer + n;
            float *v = k + rows * C, *r = v + rows * C;
            /* in = shift(norm(x)) */
#pragma omp for schedule(static)
            for (int64_t p = 0; p < pieces; p++) {
                const int64_t at = first[p] * C, count = first[p + 1] - first[p], farthest = l->shift.farthest * C;
                norm_shift(x + at, l->mixer_norm, epsilon, &l->shift, count, C, l->mixer_shift + slot[p] * farthest,
                           lines + at + p * farthest, in + at);
            }
            multiply(&l->key, in, k, rows);
            multiply(&l->value, in, v, rows);
            multiply(&l->receptance, in, r, rows);
#pragma omp barrier
            /* mixed = sigmoid(r) wkv(k, v): (rows, C) as (rows, H, N). The threads share the pairs of head and piece,
               so that a single long piece keeps all of them busy. */
#pragma omp for schedule(static)
            for (int64_t task = 0; task < H * pieces; task++) {
                const int64_t h = task / pieces, p = task % pieces;
                for (int64_t i = first[p]; i < first[p + 1]; i++) {
                    const int64_t at = i * C + h * N, now = position[slot[p]] + i - first[p], start = now - now % BLOCK;
                    const int begin = now == start || (m->known && i == first[p] && m->known[slot[p]] != start);
                    time_mix(m, l, slot[p], h, now, begin, k + at, v + at, mixed + at);
                    for (int64_t c = at; c < at + N; c++) mixed[c] *= sigmoid(r[c]);
                }
            }
            multiply(&l->output, mixed, in, rows);
#pragma omp barrier
            /* x += gamma output(mixed);   in = shift(norm(x)) */
            float *fv = k + rows * F, *fr = fv + rows * F;
#pragma omp for schedule(static)
            for (int64_t p = 0; p < pieces; p++) {
                const int64_t at = first[p] * C, count = first[p + 1] - first[p], farthest = l->shift.farthest * C;
                for (int64_t i = 0; i < count; i++) {
                    const float gamma = l->gamma ? l->gamma[entry(m, position[slot[p]] + i)] : 1;
                    for (int64_t c = at + i * C; c < at + (i + 1) * C; c++) x[c] += gamma * in[c];
                }
                norm_shift(x + at, l->ffn_norm, epsilon, &l->shift, count, C, l->ffn_shift + slot[p] * farthest,
                           lines + at + p * farthest, in + at);
            }
            multiply(&l->ffn_key, in, k, rows);
            multiply(&l->ffn_value, in, fv, rows);
            multiply(&l->ffn_receptance, in, fr, rows);
#pragma omp barrier
            /* mixed (rows, F) = act(k) v */
#pragma omp for schedule(static)
            for (int64_t part = 0; part < PARTS * rows; part++) {
                const int64_t begin = F * part / PARTS, count = F * (part + 1) / PARTS - begin;
                multiply_activated(k + begin, fv + begin, count, m->activation, mixed + begin);
            }
            multiply(&l->ffn_output, mixed, in, rows);
#pragma omp barrier
            /* x += sigmoid(r) output(mixed) */
#pragma omp for schedule(static)
            for (int64_t part = 0; part < PARTS * rows; part++) {
                const int64_t begin = C * part / PARTS, count = C * (part + 1) / PARTS - begin;
                add_gated(fr + begin, in + begin, count, x + begin);
            }
        }
        predict(&m->common, b, x, in, logits);
    }
    advance(b);
    for (int64_t p = 0; m->known && p < pieces; p++) {
        const int64_t last = position[slot[p]] - 1;
        m->known[slot[p]] = last - last % BLOCK;
    }
    return NONE;
}
