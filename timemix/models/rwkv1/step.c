/* The compiled decode step of models/rwkv1/decode.py: one token of every row through the whole model of rwkv1 or rwkv1_exp.

    x = embedding[token]
    for each layer:   z = shift(norm(x));   x += gamma(t) output(sigmoid(R z) wkv(K z, V z))
                      z = shift(norm(x));   x += sigmoid(R' z) output'(act(K' z) V' z)
    logits = head(norm(x))

   Linear maps are products of a matrix and a few vectors, limited by the time to read the weights (panels.h). Weights
   are float32, bfloat16, or int8 with a scale for each output; all else is float32. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "ops/common/activations.h"
#include "ops/common/exp.h"
#include "ops/common/norm.h"
#include "ops/common/panels.h"
#include "ops/common/types.h"

/* Elementwise work on a row is shared in this many parts, whatever the number of threads: the last numbers of a part,
   fewer than a vector, use another exp than whole vectors, so the bits depend on where parts end. */
#define PARTS 8

/* Weights and state of a layer. f_h(lag) of rwkv1 is a table. That of rwkv1_exp is a sum of K exponentials; one token
   on, slot j becomes own[j] S[j] + other[j] S[partner of j], where slots 2i and 2i+1 are partners. */
typedef struct {
    const float *mixer_norm[2], *ffn_norm[2]; /* {weight, bias} (C,) */
    const int32_t *distance;                  /* (C,): token-shift distance of each channel */
    int64_t farthest;                         /* the largest distance */
    linear key, value, receptance, output, ffn_key, ffn_value, ffn_receptance, ffn_output;
    const float *f;                                  /* (H, history), rwkv1 */
    const float *alpha, *beta, *gamma;               /* (H, positions), (H, positions), (positions,), or NULL for 1 */
    const float *own, *other, *begin, *coefficients; /* (H, K), rwkv1_exp; begin = phi(0) */
    const float *taps, *fade;                        /* (H, M), (H,), rwkv1_exp; fade = rho */
    float *numerators; /* rwkv1 (slots, H, history, N): x of each past position; rwkv1_exp (slots, H, K, N): S */
    float *denominators;            /* (slots, H, N): D */
    float *mixer_shift, *ffn_shift; /* (slots, farthest, C): newest inputs of each sublayer, oldest first */
    float *newest;                  /* (slots, H, M, N), rwkv1_exp: newest x, oldest first */
    const float *pending;           /* (slots, H, history, N), rwkv1: partial sums for later positions, or NULL */
} layer;

typedef struct {
    int64_t type, activation, vocabulary, layers, heads, channels, hidden;
    int64_t positions; /* entries of alpha, beta and gamma; the last one holds for all later positions */
    int64_t limit;     /* the number of positions, 0 if unlimited */
    int64_t history;   /* ctx_len of rwkv1, 0 for rwkv1_exp */
    int64_t modes;     /* K, 0 for rwkv1 */
    int64_t newest;    /* M */
    int64_t threads;
    float epsilon;
    const float *embedding, *norm[2]; /* (V, C), {weight, bias} (C,) */
    linear head;
    layer *layer;
} model;

/* Outputs of a panel, for the layout of weights in decode.py. */
int64_t timemix_panel(void) { return PANEL; }

/* Token-shift of y (C,) in place: y[c] = past input distance[c] tokens back. past (farthest, C) holds the newest
   inputs, oldest first: it is moved on by one, and y becomes the newest. */
static void shift(float *y, float *past, const int32_t *distance, int64_t farthest, int64_t channels) {
    if (farthest == 0) return;
    for (int64_t c = 0; c < channels; c++) {
        const float own = y[c];
        if (distance[c]) y[c] = past[(farthest - distance[c]) * channels + c];
        for (int64_t d = 0; d + 1 < farthest; d++) past[d * channels + c] = past[(d + 1) * channels + c];
        past[(farthest - 1) * channels + c] = own;
    }
}

/* x[i] += sigmoid(gate[i]) y[i], i < n. */
static void add_gated(const float *gate, const float *y, int64_t n, float *x) {
    for (int64_t i = 0; i < n; i++) x[i] += sigmoid(gate[i]) * y[i];
}

/* sum[n] += sum_{u < length} weights[-u] history[u, n], for n < width; history (length, size). `width` is a constant,
   so that the sums stay in registers while history is read once. */
INLINE void look_back(const float *weights, const float *history, int64_t length, int64_t size, const int width,
                      float *sum) {
    float held[64];
    for (int n = 0; n < width; n++) held[n] = 0;
    for (int64_t u = 0; u < length; u++)
        for (int n = 0; n < width; n++) held[n] += weights[-u] * history[u * size + n];
    for (int n = 0; n < width; n++) sum[n] += held[n];
}

/* The same for all n < size. */
static void look_back_all(const float *weights, const float *history, int64_t length, int64_t size, float *sum) {
    int64_t n = 0;
    for (; n + 64 <= size; n += 64) look_back(weights, history + n, length, size, 64, sum + n);
    for (; n + 32 <= size; n += 32) look_back(weights, history + n, length, size, 32, sum + n);
    for (; n + 8 <= size; n += 8) look_back(weights, history + n, length, size, 8, sum + n);
    for (; n < size; n++) look_back(weights, history + n, length, size, 1, sum + n);
}

/* Index into alpha, beta and gamma. */
static inline int64_t entry(const model *m, int64_t position) {
    return position < m->positions ? position : m->positions - 1;
}

/* y (N,) = wkv of one head of one row at t = position, from its key and value (N,); updates the state. Per channel,
   with x[t] = alpha(t) exp(k[t]) v[t], k clamped as in ops.wkv1:

    D[t] = rho D[t-1] + exp(k[t]),   wkv[t] = beta(t) numerator[t] / D[t]

    rwkv1:      numerator[t] = pending[t] + sum_{start<=u<=t} f(t-u) x[u],   rho = 1
    rwkv1_exp:  S_j[t] = rho (own_j S_j[t-1] + other_j S_partner[t-1]) + phi_j(0) x[t]
                numerator[t] = sum_j coefficients_j S_j[t] + sum_{lag<M} taps(lag) rho^lag x[t-lag]

   rho = exp(-forget) past ctx_len, else 1. `pending` holds the sum over u < start (tiles.py); without it start = 0. */
static void time_mix(const model *m, const layer *l, int64_t row, int64_t h, int64_t position, int64_t start,
                     const float *key, const float *value, float *y) {
    const int64_t N = m->channels / m->heads, K = m->modes, M = m->newest;
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
        if (l->pending) memcpy(y, l->pending + (history - l->numerators) + position * N, N * sizeof(float));
        look_back_all(l->f + h * m->history + position - start, history + start * N, position + 1 - start, N, y);
    }
    /* Two at a time: partners read each other's old value. With K odd, the last has no partner (other = 0). */
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
    float *newest = l->newest + (row * m->heads + h) * M * N;
    /* From the oldest on: each entry is read before it is overwritten. */
    for (int64_t lag = M; lag-- > 0;)
        for (int64_t n = 0; n < N; n++) {
            float *x = newest + (M - 1 - lag) * N + n;
            *x = lag == 0 ? source[n] : fade * x[N];
            y[n] += l->taps[h * M + lag] * *x;
        }
    for (int64_t n = 0; n < N; n++) y[n] = beta * y[n] / total[n];
}

/* Results of timemix_step, by number in decode.py. */
enum fault { NONE, UNKNOWN_TOKEN, PAST_THE_END, NO_SUCH_SLOT };

/* logits (rows, V) after tokens (rows,) for the slots slot[i], i < rows, all different, of a state with `slots` slots;
   the formula is at the top of this file.

   position (slots,) of each slot, which is advanced. start (rows,) as in time_mix, NULL for 0. `scratch` holds rows (2
   C + max(3 C, 2 F + C) + max(C, F)) numbers. Returns a fault, before anything is written. */
int timemix_step(const model *m, int64_t rows, int64_t slots, const int64_t *slot, int64_t *position,
                 const int64_t *start, const int64_t *tokens, float *logits, float *scratch) {
    for (int64_t i = 0; i < rows; i++) {
        if (slot[i] < 0 || slot[i] >= slots || position[slot[i]] < 0) return NO_SUCH_SLOT;
        if (tokens[i] < 0 || tokens[i] >= m->vocabulary) return UNKNOWN_TOKEN;
        if (m->limit && position[slot[i]] >= m->limit) return PAST_THE_END;
    }
    const int64_t C = m->channels, F = m->hidden, H = m->heads, N = C / H, t = m->type;
    const int64_t inner = 3 * C > 2 * F + C ? 3 * C : 2 * F + C;
    /* scratch: x (rows, C), in (rows, C), then k, v, r side by side: (3, rows, C) in time-mix, (2, rows, F) and (rows,
       C) in channel-mix; then mixed (rows, C) or (rows, F). */
    float *x = scratch, *in = x + rows * C, *k = in + rows * C, *mixed = k + rows * inner;
    /* One parallel region for the whole step: starting one costs as much as a small product. Each `omp for` ends in a
       barrier; multiply() does not. */
#pragma omp parallel num_threads(m->threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) memcpy(x + i * C, m->embedding + tokens[i] * C, C * sizeof(float));
        for (int64_t n = 0; n < m->layers; n++) {
            const layer *l = m->layer + n;
            float *v = k + rows * C, *r = v + rows * C;
            /* in = shift(norm(x)) */
#pragma omp for schedule(static)
            for (int64_t i = 0; i < rows; i++) {
                normalize(x + i * C, l->mixer_norm, m->epsilon, C, in + i * C);
                shift(in + i * C, l->mixer_shift + slot[i] * l->farthest * C, l->distance, l->farthest, C);
            }
            multiply(&l->key, t, in, k, rows);
            multiply(&l->value, t, in, v, rows);
            multiply(&l->receptance, t, in, r, rows);
#pragma omp barrier
            /* mixed = sigmoid(r) wkv(k, v): (rows, C) seen as (rows, H, N) */
#pragma omp for schedule(static)
            for (int64_t task = 0; task < rows * H; task++) {
                const int64_t i = task / H, h = task % H, at = i * C + h * N;
                time_mix(m, l, slot[i], h, position[slot[i]], start ? start[i] : 0, k + at, v + at, mixed + at);
                for (int64_t c = at; c < at + N; c++) mixed[c] *= sigmoid(r[c]);
            }
            multiply(&l->output, t, mixed, in, rows);
#pragma omp barrier
            /* x += gamma output(mixed);   in = shift(norm(x)) */
            float *fv = k + rows * F, *fr = fv + rows * F;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < rows; i++) {
                const float gamma = l->gamma ? l->gamma[entry(m, position[slot[i]])] : 1;
                for (int64_t c = i * C; c < (i + 1) * C; c++) x[c] += gamma * in[c];
                normalize(x + i * C, l->ffn_norm, m->epsilon, C, in + i * C);
                shift(in + i * C, l->ffn_shift + slot[i] * l->farthest * C, l->distance, l->farthest, C);
            }
            multiply(&l->ffn_key, t, in, k, rows);
            multiply(&l->ffn_value, t, in, fv, rows);
            multiply(&l->ffn_receptance, t, in, fr, rows);
#pragma omp barrier
            /* mixed (rows, F) = act(k) v */
#pragma omp for schedule(static)
            for (int64_t part = 0; part < PARTS * rows; part++) {
                const int64_t first = F * part / PARTS, count = F * (part + 1) / PARTS - first;
                multiply_activated(k + first, fv + first, count, m->activation, mixed + first);
            }
            multiply(&l->ffn_output, t, mixed, in, rows);
#pragma omp barrier
            /* x += sigmoid(r) output(mixed) */
#pragma omp for schedule(static)
            for (int64_t part = 0; part < PARTS * rows; part++) {
                const int64_t first = C * part / PARTS, count = C * (part + 1) / PARTS - first;
                add_gated(fr + first, in + first, count, x + first);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) normalize(x + i * C, m->norm, m->epsilon, C, in + i * C);
        multiply(&m->head, t, in, logits, rows);
    }
    for (int64_t i = 0; i < rows; i++) position[slot[i]]++;
    return NONE;
}
