/* The compiled step of models/rwkv6/decode.py. It feeds prompts and new tokens through a whole model of rwkv5 or rwkv6.

    x = input_norm(embedding[token])
    for each layer:   z = norm(x);   x += output(silu(gate) * head_norm(y)),   y = wkv6(r, w, k, v)
                      z = norm(x);   x += sigmoid(ffn_r) * ffn_value(relu(ffn_k)^2)
    logits = head(norm(x))

   Each of r, k, v, gate, ffn_k and ffn_r is a map of a mixture of z and z', the z of the previous token. In rwkv5, the
   shares of the mixtures and the log-decay w are parameters. In rwkv6, both depend on the token: w = -exp(decay of a
   mixture), and

    mixture n = z + (z' - z) (mix[n] + up[n](tanh(down[n](z + (z' - z) first_mix))))

   A call processes pieces of consecutive tokens (step.h). All rows are multiplied by the weights together (panels.h).
   Only the mixtures and wkv6 connect the rows of a piece. All numbers but the weights of linear maps are float32.

   The order in which a number of a row is summed depends only on the row itself. So each result is bit-identical for
   any division of texts into pieces, and for any other texts, slots or threads. */

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
#include "ops/rwkv6/wkv6.h"

/* The mixtures of a time-mix, in the order of MIXED_6 in model.py. rwkv5 has no DECAY. */
enum mixture { DECAY, KEY, VALUE, RECEPTANCE, GATE, MIXTURES };

/* Weights and state of a layer. In rwkv5, first_mix and the low-rank maps are NULL. RWKV-5.0 has no gate. */
typedef struct {
    const float *mixer_norm[2], *ffn_norm[2], *head_norm[2];             /* {weight, bias} (C,) */
    const float *first_mix, *mix[MIXTURES], *ffn_mix[2];      /* (C,): share of the previous token */
    linear key, value, receptance, gate, output, ffn_key, ffn_receptance, ffn_value;
    linear mix_down, mix_up[MIXTURES]; /* mix_down: the first maps of all mixtures, as one map */
    linear decay_down, decay_up;
    const float *decay, *bonus;     /* (C,): w of rwkv5, u of wkv6 */
    float *mixer_shift, *ffn_shift; /* (slots, C): newest z of each sublayer */
    float *wkv;                     /* (slots, H, N, N): S */
} layer;

typedef struct {
    common common;
    int64_t heads, hidden;
    int64_t rank, decay_rank; /* ranks of the low-rank maps to the mixtures and to the decay, 0 in rwkv5 */
    float head_epsilon;
    layer *layer;
} model;

/* Intermediate results of all rows of a call, each (rows, C) except the hidden channels. */
typedef struct {
    float *x, *z, *in[MIXTURES], *k, *v, *r, *gate, *decay;
    float *all_low;       /* (rows, MIXTURES, rank): hidden channels of the low-rank maps to the mixtures */
    float *low[MIXTURES]; /* (rows, rank): tanh of the hidden channels of each map */
    float *low_decay;     /* (rows, decay_rank): hidden channels of the low-rank map to the decay */
    float *hidden;        /* (rows, F) */
    int32_t *lists;       /* (blocks, LIST(F)): hidden channels that are not zero, see sparse.h */
} rows;

/* Number of (rows, C) tensors in `rows`. */
#define WIDE (2 + MIXTURES + 5)

/* Size of the scratch memory of timemix_step, in numbers. */
int64_t timemix_scratch(const model *m, int64_t count, int64_t pieces) {
    (void)pieces;
    const int64_t blocks = (count + ROWS - 1) / ROWS, low = 2 * MIXTURES * m->rank + m->decay_rank;
    return count * (WIDE * m->common.channels + low + m->hidden) + blocks * LIST(m->hidden);
}

/* Divides the scratch memory. */
static rows divided(const model *m, int64_t count, float *scratch) {
    const int64_t size = count * m->common.channels;
    rows w;
    float **const wide[] = {&w.x, &w.z, &w.k, &w.v, &w.r, &w.gate, &w.decay};
    for (int64_t n = 0; n < 7; n++, scratch += size) *wide[n] = scratch;
    for (int64_t n = 0; n < MIXTURES; n++, scratch += size) w.in[n] = scratch;
    for (int64_t n = 0; n < MIXTURES; n++, scratch += count * m->rank) w.low[n] = scratch;
    w.all_low = scratch;
    w.low_decay = w.all_low + count * MIXTURES * m->rank;
    w.hidden = scratch = w.low_decay + count * m->decay_rank;
    w.lists = (int32_t *)(scratch + count * m->hidden);
    return w;
}

/* y (n,) = tanh(x). */
static void tanh_row(const float *x, int64_t n, float *y) {
    for (int64_t i = 0; i < n; i++) y[i] = tanhf(x[i]);
}

/* The mixtures of rwkv6, whose shares are mix[n] plus a low-rank map of a first mixture. */
static void learned_mixtures(const model *m, const layer *l, const batch *b, const rows *w) {
    const int64_t count = b->first[b->pieces], C = m->common.channels, R = m->rank;
    norm_rows(&m->common, b, l->mixer_norm, w->x, w->z);
    mix_rows(&m->common, b, w->z, l->mixer_shift, &l->first_mix, 1, (float *const[]){w->r});
    multiply(&l->mix_down, w->r, w->all_low, count);
#pragma omp barrier
#pragma omp for collapse(2) schedule(static)
    for (int64_t i = 0; i < count; i++)
        for (int64_t n = 0; n < MIXTURES; n++)
            /* (rows, MIXTURES, rank) -> (MIXTURES, rows, rank) */
            tanh_row(w->all_low + (i * MIXTURES + n) * R, R, w->low[n] + i * R);
    for (int64_t n = 0; n < MIXTURES; n++) multiply(&l->mix_up[n], w->low[n], w->in[n], count);
#pragma omp barrier
#pragma omp for collapse(2) schedule(static)
    for (int64_t i = 0; i < count; i++)
        for (int64_t n = 0; n < MIXTURES; n++) {
            const float *own = w->z + i * C;
            const float *previous = previous_row(&m->common, b, w->z, l->mixer_shift, i, piece_of(b, i));
            float *mixed = w->in[n] + i * C;
            for (int64_t c = 0; c < C; c++) mixed[c] = own[c] + (previous[c] - own[c]) * (l->mix[n][c] + mixed[c]);
        }
    keep_last(&m->common, b, w->z, l->mixer_shift);
}

/* Tokens of a head that are computed together. Their vectors fit into the first-level cache beside S. */
#define TOKENS 8

/* The inputs of wkv6 for the token t of x, which is row i, in head h. */
static void before_wkv6(int64_t N, const model *m, const layer *l, const rows *w, int64_t i, int64_t h, int64_t t,
                        const wkv6_tokens *x) {
    const int64_t c = h * N, at = i * m->common.channels + c;
    const float *r = w->r + at, *k = w->k + at, *v = w->v + at, *u = l->bonus + c, *decay = l->decay + c;
    float *y = x->y + t * N, p = 0;
    memcpy(x->r + t * N, r, N * sizeof(float));
    memcpy(x->k + t * N, k, N * sizeof(float));
    memcpy(x->v + t * N, v, N * sizeof(float));
    if (l->decay_up.weight) {
        float *own = w->decay + at;
        /* exp(-exp(80)) is 0, and the file is compiled for finite numbers. */
        for (int64_t n = 0; n < N; n++) own[n] = -expf(fminf(own[n], 80));
        decay = own;
    }
    exp_factors(N, decay, x->c + t * N, x->m + t * N);
#pragma omp simd reduction(+ : p)
    for (int64_t n = 0; n < N; n++) p += r[n] * u[n] * k[n];
    for (int64_t n = 0; n < N; n++) y[n] = p * v[n];
}

/* r = silu(gate) * norm(y) for the token t of x, which is row i, in head h. The norm is over N. */
static void finish(int64_t N, const model *m, const layer *l, const rows *w, int64_t i, int64_t h, int64_t t,
                   const wkv6_tokens *x) {
    const int64_t c = h * N, at = i * m->common.channels + c;
    const float *const norm[2] = {l->head_norm[0] + c, l->head_norm[1] + c}, *gate = w->gate + at;
    float *r = w->r + at;
    normalize(x->y + t * N, norm, m->head_epsilon, N, r);
    if (l->gate.weight)
        for (int64_t n = 0; n < N; n++) r[n] *= gate[n] * sigmoid(gate[n]);
}

/* The time-mix of all tokens of the piece p in head h, whose state S is (N, N). */
static void time_mix(const model *m, const layer *l, const batch *b, const rows *w, int64_t p, int64_t h) {
    const int64_t N = m->common.channels / m->heads;
    float *S = l->wkv + (b->slot[p] * m->heads + h) * N * N, held[6][TOKENS * N];
    const wkv6_tokens x = {held[0], held[1], held[2], held[3], held[4], held[5]};
    for (int64_t i = b->first[p]; i < b->first[p + 1]; i += TOKENS) {
        const int64_t left = b->first[p + 1] - i, count = left < TOKENS ? left : TOKENS;
        for (int64_t t = 0; t < count; t++) before_wkv6(N, m, l, w, i + t, h, t, &x);
        wkv6(N, count, S, &x);
        for (int64_t t = 0; t < count; t++) finish(N, m, l, w, i + t, h, t, &x);
    }
}

/* x += output(time-mix of the mixtures of z). */
static void mixer(const model *m, const layer *l, const batch *b, const rows *w) {
    const int64_t count = b->first[b->pieces], C = m->common.channels, fixed = (l->gate.weight ? MIXTURES : GATE) - KEY;
    if (l->first_mix) learned_mixtures(m, l, b, w);
    else norm_mix(&m->common, b, l->mixer_norm, w->x, w->z, l->mix + KEY, fixed, w->in + KEY, l->mixer_shift);
    multiply(&l->receptance, w->in[RECEPTANCE], w->r, count);
    multiply(&l->key, w->in[KEY], w->k, count);
    multiply(&l->value, w->in[VALUE], w->v, count);
    if (l->gate.weight) multiply(&l->gate, w->in[GATE], w->gate, count);
    if (l->decay_down.weight) {
        multiply(&l->decay_down, w->in[DECAY], w->low_decay, count);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++)
            tanh_row(w->low_decay + i * m->decay_rank, m->decay_rank, w->low_decay + i * m->decay_rank);
        multiply(&l->decay_up, w->low_decay, w->decay, count);
    }
#pragma omp barrier
    /* The threads share the pairs of head and piece, so that a single long piece keeps all of them busy. */
#pragma omp for schedule(static)
    for (int64_t task = 0; task < m->heads * b->pieces; task++)
        time_mix(m, l, b, w, task / m->heads, task % m->heads);
    multiply(&l->output, w->r, w->z, count);
#pragma omp barrier
    add_rows(w->x, w->z, count, C);
}

/* x += sigmoid(ffn_r) * ffn_value(relu(ffn_k)^2). */
static void channel_mix(const model *m, const layer *l, const batch *b, const rows *w) {
    const receptance_mix own = {l->ffn_norm, l->ffn_mix, &l->ffn_key, &l->ffn_receptance, &l->ffn_value};
    receptance_channel_mix(&m->common, b, &own, w->x, w->z, w->in, w->r, w->hidden, w->lists, l->ffn_shift);
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
