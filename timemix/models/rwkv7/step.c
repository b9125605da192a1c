/* The compiled step of models/rwkv7/decode.py. It feeds prompts and new tokens through a whole rwkv7 model.

    x = input_norm(embedding[token])
    for each layer:   z = norm(x);   x += output(gate * (head_norm(y) + bonus(r, k) v)),   y = wkv7(r, w, k, v, -q, q a)
                      z = norm(x);   x += ffn_value(relu(ffn_key(mixture of z and previous z))^2)
    logits = head(norm(x))

   Each of r, w, k, v, a and gate is a map of a mixture of z and the z of the previous token. before_wkv7() and finish()
   have the formulas.

   A call processes pieces of consecutive tokens (step.h). All rows are multiplied by the weights together (panels.h).
   Only the mixtures and wkv7 connect the rows of a piece. All numbers but the weights of linear maps are float32.

   The order in which a number of a row is summed depends only on the row itself. So each result is bit-identical for any
   division of texts into pieces, and for any other texts, slots or threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "ops/common/exp.h"
#include "ops/common/mix.h"
#include "ops/common/norm.h"
#include "ops/common/panels.h"
#include "ops/common/sparse.h"
#include "ops/common/step.h"
#include "ops/common/types.h"
#include "ops/rwkv7/wkv7.h"

/* The mixtures of a time-mix, in the order of MIXED in model.py. */
enum mixture { RECEPTANCE, DECAY, KEY, VALUE, RATE, GATE, MIXTURES };
/* The low-rank maps, in the order of _LOW_RANKS in decode.py. */
enum low_rank { OF_DECAY, OF_RATE, OF_RESIDUAL, OF_GATE, LOW_RANKS };

/* Weights and state of a layer. In layer 0, down[OF_RESIDUAL] has no weight. */
typedef struct {
    const float *mixer_norm[2], *ffn_norm[2], *head_norm[2]; /* {weight, bias} (C,) */
    const float *mix[MIXTURES], *ffn_mix;                    /* (C,): weight of the previous token */
    linear receptance, key, value, output, down[LOW_RANKS], up[LOW_RANKS], ffn_key, ffn_value;
    const float *removal, *replacement, *bonus; /* (C,) */
    float *mixer_shift, *ffn_shift;             /* (slots, C): newest z of each sublayer */
    float *wkv;                                 /* (slots, H, N, N): S */
} layer;

typedef struct {
    common common;
    int64_t heads, hidden;
    int64_t ranks; /* sum of the ranks of the low-rank maps */
    float head_epsilon;
    layer *layer;
} model;

/* Intermediate results of all rows of a call, each (rows, C) except `low`. */
typedef struct {
    float *x, *z, *in[MIXTURES];
    float *low[LOW_RANKS];    /* (rows, rank): hidden channels of the low-rank maps */
    float *up[LOW_RANKS];     /* results of the low-rank maps */
    float *r, *k, *v, *first; /* `first`: v of layer 0 */
    float *hidden;            /* (rows, F) */
    int32_t *lists;           /* (blocks, LIST(F)): hidden channels that are not zero, see sparse.h */
} rows;

/* Number of (rows, C) tensors in `rows`. */
#define WIDE (2 + MIXTURES + LOW_RANKS + 4)

/* Size of the scratch memory of timemix_step, in numbers. */
int64_t timemix_scratch(const model *m, int64_t count, int64_t pieces) {
    (void)pieces;
    const int64_t blocks = (count + ROWS - 1) / ROWS;
    return count * (WIDE * m->common.channels + m->ranks + m->hidden) + blocks * LIST(m->hidden);
}

/* Divides the scratch memory. The ranks are equal in all layers; layer 0 has no residual, so the last layer counts. */
static rows divided(const model *m, int64_t count, float *scratch) {
    const int64_t size = count * m->common.channels;
    const layer *last = m->layer + m->common.layers - 1;
    rows w;
    float **const wide[] = {&w.x, &w.z, &w.r, &w.k, &w.v, &w.first};
    for (int64_t n = 0; n < 6; n++, scratch += size) *wide[n] = scratch;
    for (int64_t n = 0; n < MIXTURES; n++, scratch += size) w.in[n] = scratch;
    for (int64_t n = 0; n < LOW_RANKS; n++, scratch += size) w.up[n] = scratch;
    for (int64_t n = 0; n < LOW_RANKS; scratch += count * last->down[n++].outputs) w.low[n] = scratch;
    w.hidden = scratch;
    w.lists = (int32_t *)(scratch + count * m->hidden);
    return w;
}

/* The activations of the hidden channels of the low-rank maps of a row: tanh for the decay, sigmoid for the gate. */
static void activate_low(const layer *l, const rows *w, int64_t i) {
    const int64_t D = l->down[OF_DECAY].outputs, G = l->down[OF_GATE].outputs;
    float *decay = w->low[OF_DECAY] + i * D, *gate = w->low[OF_GATE] + i * G;
    for (int64_t n = 0; n < D; n++) decay[n] = tanhf(decay[n]);
    for (int64_t n = 0; n < G; n++) gate[n] = sigmoid(gate[n]);
}

/* Tokens of a head that are computed together. Their vectors fit into the first-level cache beside S. */
#define TOKENS 8

/* The inputs of wkv7 for the token t of x, which is row i, from the results of the products r, k, v, decay, rate and
   residual (N,) of head h. Returns r . bonus k.

    v = v + sigmoid(residual) (v of layer 0 - v)         w = -exp(-1/2) sigmoid(decay)        rate = sigmoid(rate)
    q = k removal / |k removal|                          k = k (1 + (rate - 1) replacement)
    m = exp(w) - 1          a = -q          b = q rate */
static float before_wkv7(int64_t N, const model *m, const layer *l, const rows *w, int64_t i, int64_t h, int64_t t,
                     const wkv7_tokens *x) {
    const int64_t c = h * N, at = i * m->common.channels + c;
    const float *r = w->r + at, *key = w->k + at, *value = w->v + at;
    const float *decay = w->up[OF_DECAY] + at, *rates = w->up[OF_RATE] + at, *residual = w->up[OF_RESIDUAL] + at;
    float *first = w->first + at, *k = x->k + t * N, *v = x->v + t * N, *a = x->a + t * N, *b = x->b + t * N;
    float squares = 0, bonus = 0;
    memcpy(x->r + t * N, r, N * sizeof(float));
    if (l->up[OF_RESIDUAL].weight)
        for (int64_t n = 0; n < N; n++) v[n] = value[n] + (first[n] - value[n]) * sigmoid(residual[n]);
    else {
        memcpy(v, value, N * sizeof(float));
        memcpy(first, value, N * sizeof(float));
    }
#pragma omp simd reduction(+ : squares, bonus)
    for (int64_t n = 0; n < N; n++) {
        const float rate = sigmoid(rates[n]), q = key[n] * l->removal[c + n];
        x->m[t * N + n] = expm1_series(-0.60653066f * sigmoid(decay[n]));
        k[n] = key[n] * (1 + (rate - 1) * l->replacement[c + n]);
        a[n] = -q;
        b[n] = q * rate;
        squares += q * q;
        bonus += r[n] * k[n] * l->bonus[c + n];
    }
    const float scale = 1 / fmaxf(sqrtf(squares), 1e-12f);
    for (int64_t n = 0; n < N; n++) {
        a[n] *= scale;
        b[n] *= scale;
    }
    return bonus;
}

/* r = gate * (norm(y) + bonus v) for the token t of x, which is row i, in head h. The norm is over N. */
static void finish(int64_t N, const model *m, const layer *l, const rows *w, int64_t i, int64_t h, int64_t t,
                   const wkv7_tokens *x, float bonus) {
    const int64_t c = h * N, at = i * m->common.channels + c;
    const float *const norm[2] = {l->head_norm[0] + c, l->head_norm[1] + c}, *gate = w->up[OF_GATE] + at;
    float *y = x->y + t * N, *r = w->r + at;
    normalize(y, norm, m->head_epsilon, N, y);
    for (int64_t n = 0; n < N; n++) r[n] = gate[n] * (y[n] + bonus * x->v[t * N + n]);
}

/* The time-mix of all tokens of the piece p in head h, whose state S is (N, N). */
static void time_mix(const model *m, const layer *l, const batch *b, const rows *w, int64_t p, int64_t h) {
    const int64_t N = m->common.channels / m->heads;
    float *S = l->wkv + (b->slot[p] * m->heads + h) * N * N, held[7][TOKENS * N], bonus[TOKENS];
    const wkv7_tokens x = {held[0], held[1], held[2], held[3], held[4], held[5], held[6]};
    for (int64_t i = b->first[p]; i < b->first[p + 1]; i += TOKENS) {
        const int64_t left = b->first[p + 1] - i, count = left < TOKENS ? left : TOKENS;
        for (int64_t t = 0; t < count; t++) bonus[t] = before_wkv7(N, m, l, w, i + t, h, t, &x);
        wkv7(N, count, S, &x);
        for (int64_t t = 0; t < count; t++) finish(N, m, l, w, i + t, h, t, &x, bonus[t]);
    }
}

/* x += output(time-mix of the mixtures of z). */
static void mixer(const model *m, const layer *l, const batch *b, const rows *w) {
    const int64_t count = b->first[b->pieces], C = m->common.channels;
    static const enum mixture source[LOW_RANKS] = {DECAY, RATE, VALUE, GATE};
    norm_mix(&m->common, b, l->mixer_norm, w->x, w->z, l->mix, MIXTURES, w->in, l->mixer_shift);
    multiply(&l->receptance, w->in[RECEPTANCE], w->r, count);
    multiply(&l->key, w->in[KEY], w->k, count);
    multiply(&l->value, w->in[VALUE], w->v, count);
    for (int64_t n = 0; n < LOW_RANKS; n++)
        if (l->down[n].weight) multiply(&l->down[n], w->in[source[n]], w->low[n], count);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) activate_low(l, w, i);
    for (int64_t n = 0; n < LOW_RANKS; n++)
        if (l->up[n].weight) multiply(&l->up[n], w->low[n], w->up[n], count);
#pragma omp barrier
    /* The threads share the pairs of head and piece, so that a single long piece keeps all of them busy. */
#pragma omp for schedule(static)
    for (int64_t task = 0; task < m->heads * b->pieces; task++)
        time_mix(m, l, b, w, task / m->heads, task % m->heads);
    multiply(&l->output, w->r, w->z, count);
#pragma omp barrier
    add_rows(w->x, w->z, count, C);
}

/* x += ffn_value(relu(ffn_key(mixture of z))^2). */
static void channel_mix(const model *m, const layer *l, const batch *b, const rows *w) {
    const int64_t count = b->first[b->pieces], C = m->common.channels;
    norm_mix(&m->common, b, l->ffn_norm, w->x, w->z, &l->ffn_mix, 1, w->in, l->ffn_shift);
    multiply(&l->ffn_key, w->in[0], w->hidden, count);
#pragma omp barrier
    square_relu(&l->ffn_value, w->hidden, w->lists, count);
    multiply_sparse(&l->ffn_value, w->hidden, w->lists, w->z, count);
#pragma omp barrier
    add_rows(w->x, w->z, count, C);
}

/* logits (outputs, V) after the wanted rows of some pieces. The formula is at the top of this file. scratch has
   timemix_scratch() numbers. Returns NONE, or a fault before anything is written. */
int timemix_step(const model *m, const batch *b, float *logits, float *scratch) {
    const enum fault fault = check(&m->common, b);
    if (fault != NONE) return fault;
    const rows w = divided(m, b->first[b->pieces], scratch);
    /* The whole step is one parallel region: starting a region costs as much as a small product. Each `omp for` ends in
       a barrier; multiply() does not. */
#pragma omp parallel num_threads(m->common.threads)
    {
        embed(&m->common, b, w.x);
        for (int64_t n = 0; n < m->common.layers; n++) {
            mixer(m, m->layer + n, b, &w);
            channel_mix(m, m->layer + n, b, &w);
        }
        predict(&m->common, b, w.x, w.z, logits);
    }
    advance(b);
    return NONE;
}
