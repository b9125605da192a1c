/* The compiled step of models/rwkv4/decode.py. It feeds prompts and new tokens through a whole rwkv4 model.

    x = input_norm(embedding[token])
    for each layer:   z = norm(x);   x += output(sigmoid(r) * wkv4(k, v))
                      z = norm(x);   x += sigmoid(ffn_r) * ffn_value(relu(ffn_k)^2)
    logits = head(norm(x))

   Each of k, v, r, ffn_k and ffn_r is a map of a mixture of z and the z of the previous token.

   A call processes pieces of consecutive tokens (step.h). All rows are multiplied by the weights together (panels.h).
   Only the mixtures and wkv4 connect the rows of a piece. All numbers but the weights of linear maps are float32.

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
#include "ops/rwkv4/wkv4.h"

/* The mixtures of a time-mix, in the order of MIXED in model.py. */
enum mixture { KEY, VALUE, RECEPTANCE, MIXTURES };

/* Weights and state of a layer. */
typedef struct {
    const float *mixer_norm[2], *ffn_norm[2];             /* {weight, bias} (C,) */
    const float *mix[MIXTURES], *ffn_mix[2];   /* (C,): share of the previous token */
    linear key, value, receptance, output, ffn_key, ffn_receptance, ffn_value;
    const float *decay, *bonus;     /* (C,): w and u of wkv4 */
    float *mixer_shift, *ffn_shift; /* (slots, C): newest z of each sublayer */
    float *wkv;                     /* (slots, 3, C): state of wkv4 */
} layer;

typedef struct {
    common common;
    int64_t hidden;
    layer *layer;
} model;

/* Intermediate results of all rows of a call, each (rows, C) except `hidden` (rows, F). */
typedef struct {
    float *x, *z, *in[MIXTURES], *k, *v, *r, *hidden;
    int32_t *lists; /* (blocks, LIST(F)): hidden channels that are not zero, see sparse.h */
} rows;

/* Number of (rows, C) tensors in `rows`. */
#define WIDE (2 + MIXTURES + 3)

/* Size of the scratch memory of timemix_step, in numbers. */
int64_t timemix_scratch(const model *m, int64_t count, int64_t pieces) {
    (void)pieces;
    const int64_t blocks = (count + ROWS - 1) / ROWS;
    return count * (WIDE * m->common.channels + m->hidden) + blocks * LIST(m->hidden);
}

/* Divides the scratch memory. */
static rows divided(const model *m, int64_t count, float *scratch) {
    const int64_t size = count * m->common.channels;
    rows w;
    float **const wide[] = {&w.x, &w.z, &w.k, &w.v, &w.r};
    for (int64_t n = 0; n < 5; n++, scratch += size) *wide[n] = scratch;
    for (int64_t n = 0; n < MIXTURES; n++, scratch += size) w.in[n] = scratch;
    w.hidden = scratch;
    w.lists = (int32_t *)(scratch + count * m->hidden);
    return w;
}

/* r = sigmoid(r) * wkv4(k, v) of the channels `first` to first + BLOCK - 1 of a piece. */
static void time_mix(const model *m, const layer *l, const batch *b, const rows *w, int64_t piece, int64_t first) {
    const int64_t C = m->common.channels, count = C - first < BLOCK ? C - first : BLOCK;
    float *past = l->wkv + b->slot[piece] * 3 * C + first;
    wkv4_state s, next;
    wkv4_load(&s, past, C, count);
    for (int64_t i = b->first[piece]; i < b->first[piece + 1]; i++) {
        const float *k = w->k + i * C + first, *v = w->v + i * C + first;
        float *r = w->r + i * C + first, y[BLOCK];
        wkv4_read(&s, l->bonus + first, k, v, y, count);
        wkv4_update(&s, &next, l->decay + first, k, v, count);
        s = next;
        for (int64_t c = 0; c < count; c++) r[c] = sigmoid_series(r[c]) * y[c];
    }
    wkv4_store(&s, past, C, count);
}

/* x += output(sigmoid(r) * wkv4(k, v)). */
static void mixer(const model *m, const layer *l, const batch *b, const rows *w) {
    const int64_t C = m->common.channels, count = b->first[b->pieces], blocks = (C + BLOCK - 1) / BLOCK;
    norm_mix(&m->common, b, l->mixer_norm, w->x, w->z, l->mix, MIXTURES, w->in, l->mixer_shift);
    multiply(&l->key, w->in[KEY], w->k, count);
    multiply(&l->value, w->in[VALUE], w->v, count);
    multiply(&l->receptance, w->in[RECEPTANCE], w->r, count);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t task = 0; task < blocks * b->pieces; task++)
        time_mix(m, l, b, w, task / blocks, task % blocks * BLOCK);
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
