/* The compiled step of models/attention/decode.py. It feeds prompts and new tokens through a whole model of rotary
   attention and gated feed-forward sublayers.

    x = embedding[token]
    for each layer:   z = shift(norm(x));   x += output(attention(rotary(Q z), rotary(K z), V z))
                      z = shift(norm(x));   x += output'(act(K' z) V' z)
    logits = head(norm(x))

   The norm is LayerNorm or RMSNorm. Linear maps may have a bias. Token-shift is optional. H query heads share G <= H
   key/value heads: query head h reads key/value head h G / H.

   A call processes pieces of consecutive tokens (step.h). All rows are multiplied by the weights together (panels.h).
   Only token-shift and attention connect the rows of a piece. All numbers but the weights of linear maps are
   float32.

   The order in which a number of a row is summed depends only on the position of the row. So each result is
   bit-identical for any division of texts into pieces, and for any other texts, slots or threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "ops/common/activations.h"
#include "ops/common/attention.h"
#include "ops/common/panels.h"
#include "ops/common/shift.h"
#include "ops/common/step.h"
#include "ops/common/types.h"

/* Weights and state of a layer. `limit` of step.h is the number of positions of the cache. */
typedef struct {
    const float *mixer_norm[2], *ffn_norm[2]; /* {weight, bias} (C,); RMSNorm has no bias */
    token_shift shift;
    linear query, key, value, output, ffn_key, ffn_value, ffn_output;
    float *keys, *values;           /* (slots, G, limit, N): rotated keys, and values */
    float *mixer_shift, *ffn_shift; /* (slots, farthest, C): newest inputs of each sublayer, oldest first */
} layer;

typedef struct {
    common common;
    int64_t heads, key_heads; /* H, G */
    int64_t hidden, activation;
    int64_t pairs;      /* pairs of rotated dimensions of a head */
    const float *turns; /* (2, limit, pairs): cos and sin of each position's angles */
    layer *layer;
} model;

/* x (n,) += y (n,) */
static void add(const float *y, int64_t n, float *x) {
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

/* x += y, unless y is NULL; then in = shift(norm(x)). x, y and in are (rows, C), and `in` may be y. `past` and `lines`
   are those of norm_shift() for all slots and all pieces. */
static void add_norm(const model *m, const batch *b, const layer *l, const float *y, const float *const norm[2],
                     float *past, float *lines, float *x, float *in) {
    const int64_t C = m->common.channels, farthest = l->shift.farthest * C;
    const float epsilon = m->common.epsilon;
    if (!farthest) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < b->first[b->pieces]; i++) {
            if (y) add(y + i * C, C, x + i * C);
            normalize(x + i * C, norm, epsilon, C, in + i * C);
        }
        return;
    }
#pragma omp for schedule(static)
    for (int64_t p = 0; p < b->pieces; p++) {
        const int64_t at = b->first[p] * C, count = b->first[p + 1] - b->first[p];
        if (y) add(y + at, count * C, x + at);
        norm_shift(x + at, norm, epsilon, &l->shift, count, C, past + b->slot[p] * farthest,
                   lines + at + p * farthest, in + at);
    }
}

/* Rotates q (rows, C) in place, scaled by 1/sqrt(N), and stores the rotated keys k (rows, G N) and the values v (rows,
   G N) in the cache. */
static void append(const model *m, const batch *b, const layer *l, float *q, const float *k, const float *v) {
    const int64_t H = m->heads, G = m->key_heads, N = m->common.channels / H, limit = m->common.limit;
    const float scale = 1 / sqrtf(N);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b->first[b->pieces]; i++) {
        const int64_t p = piece_of(b, i), slot = b->slot[p], t = b->position[slot] + i - b->first[p];
        const float *cosine = m->turns + t * m->pairs, *sine = cosine + limit * m->pairs;
        for (int64_t h = 0; h < H; h++) {
            float *query = q + (i * H + h) * N;
            rotate(query, cosine, sine, m->pairs, N, scale, query);
        }
        for (int64_t g = 0; g < G; g++) {
            const int64_t from = (i * G + g) * N, to = ((slot * G + g) * limit + t) * N;
            rotate(k + from, cosine, sine, m->pairs, N, 1, l->keys + to);
            memcpy(l->values + to, v + from, N * sizeof(float));
        }
    }
}

/* mixed (rows, H, N) = attention of the queries q (rows, H, N) over the cache. The threads share the pairs of a head
   and TARGETS rows. The rows of a pair may belong to several pieces. */
static void mix(const model *m, const batch *b, const layer *l, const float *q, float *mixed) {
    const int64_t C = m->common.channels, H = m->heads, G = m->key_heads, N = C / H, rows = b->first[b->pieces];
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t h = 0; h < H; h++)
        for (int64_t begin = 0; begin < rows; begin += TARGETS) {
            const int64_t end = begin + TARGETS < rows ? begin + TARGETS : rows;
            int64_t stop;
            for (int64_t i = begin; i < end; i = stop) {
                const int64_t p = piece_of(b, i), slot = b->slot[p], t = b->position[slot] + i - b->first[p];
                const int64_t cache = (slot * G + h * G / H) * m->common.limit * N;
                stop = b->first[p + 1] < end ? b->first[p + 1] : end;
                attend(q + i * C + h * N, l->keys + cache, l->values + cache, t, stop - i, N, C, mixed + i * C + h * N);
            }
        }
}

/* mixed (rows, F) = act(key) value */
static void gate(const model *m, int64_t rows, const float *key, const float *value, float *mixed) {
    const int64_t F = m->hidden;
#pragma omp for schedule(static)
    for (int64_t part = 0; part < PARTS * rows; part++) {
        const int64_t begin = F * part / PARTS, count = F * (part + 1) / PARTS - begin;
        multiply_activated(key + begin, value + begin, count, m->activation, mixed + begin);
    }
}

/* Numbers per row for q, k, v side by side, (C), (G N), (G N), or for the two products of the feed-forward sublayer. */
static int64_t inner(const model *m) {
    const int64_t C = m->common.channels, attention = C + 2 * m->key_heads * (C / m->heads);
    return attention > 2 * m->hidden ? attention : 2 * m->hidden;
}

/* Numbers per row for `mixed`: (C) in attention, (F) in the feed-forward sublayer. */
static int64_t wide(const model *m) { return m->common.channels > m->hidden ? m->common.channels : m->hidden; }

/* Size of the scratch memory of timemix_step, in numbers. */
int64_t timemix_scratch(const model *m, int64_t rows, int64_t pieces) {
    const int64_t C = m->common.channels;
    int64_t farthest = 0;
    for (int64_t n = 0; n < m->common.layers; n++)
        if (m->layer[n].shift.farthest > farthest) farthest = m->layer[n].shift.farthest;
    /* The lines of norm_shift. */
    const int64_t lines = farthest ? (rows + pieces * farthest) * C : 0;
    return rows * (2 * C + inner(m) + wide(m)) + lines;
}

/* logits (outputs, V) after the wanted rows of some pieces. The formula is at the top of this file. scratch has
   timemix_scratch() numbers. Returns NONE, or a fault before anything is written. */
int timemix_step(const model *m, const batch *b, float *logits, float *scratch) {
    const enum fault fault = check(&m->common, b);
    if (fault != NONE) return fault;
    const int64_t rows = b->first[b->pieces], C = m->common.channels, F = m->hidden;
    const int64_t shared = m->key_heads * (C / m->heads);
    /* scratch: x (rows, C), in (rows, C), then q, k, v, then mixed (rows, C) or (rows, F), then the lines. */
    float *x = scratch, *in = x + rows * C, *q = in + rows * C, *k = q + rows * C, *v = k + rows * shared;
    float *mixed = q + rows * inner(m), *lines = mixed + rows * wide(m), *ffn_v = q + rows * F;
    /* The whole step is one parallel region: starting a region costs as much as a small product. Each `omp for` ends in
       a barrier; multiply() does not. */
#pragma omp parallel num_threads(m->common.threads)
    {
        embed(&m->common, b, x);
        for (int64_t n = 0; n < m->common.layers; n++) {
            const layer *l = m->layer + n;
            add_norm(m, b, l, n ? in : NULL, l->mixer_norm, l->mixer_shift, lines, x, in);
            multiply(&l->query, in, q, rows);
            multiply(&l->key, in, k, rows);
            multiply(&l->value, in, v, rows);
#pragma omp barrier
            append(m, b, l, q, k, v);
            mix(m, b, l, q, mixed);
            multiply(&l->output, mixed, in, rows);
#pragma omp barrier
            add_norm(m, b, l, in, l->ffn_norm, l->ffn_shift, lines, x, in);
            multiply(&l->ffn_key, in, q, rows);
            multiply(&l->ffn_value, in, ffn_v, rows);
#pragma omp barrier
            gate(m, rows, q, ffn_v, mixed);
            multiply(&l->ffn_output, mixed, in, rows);
#pragma omp barrier
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) add(in + i * C, C, x + i * C);
        predict(&m->common, b, x, in, logits);
    }
    advance(b);
    return NONE;
}
