/* Parts of the decode steps that RWKV-4 to RWKV-7 share: mixtures of tokens, and relu^2 of hidden channels. All
   functions are called inside a parallel region by all threads, which share the rows. */

#ifndef TIMEMIX_MIX_H
#define TIMEMIX_MIX_H

#include <math.h>

#include "ops/common/exp.h"
#include "ops/common/norm.h"
#include "ops/common/sparse.h"
#include "ops/common/step.h"

/* z = norm(x), both (rows, C). */
static void norm_rows(const common *m, const batch *b, const float *const norm[2], const float *x, float *z) {
    const int64_t C = m->channels;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b->first[b->pieces]; i++) normalize(x + i * C, norm, m->epsilon, C, z + i * C);
}

/* The z of the token before the row i of piece p: an earlier row of the piece, or `past` (slots, C). */
static const float *previous_row(const common *m, const batch *b, const float *z, const float *past, int64_t i,
                                 int64_t p) {
    return i == b->first[p] ? past + b->slot[p] * m->channels : z + (i - 1) * m->channels;
}

/* in[n] = z + mix[n] (previous - z), where `previous` is the z of the previous token. z and in[n] are (rows, C). */
static void mix_rows(const common *m, const batch *b, const float *z, const float *past, const float *const *mix,
                     int64_t mixtures, float *const *in) {
    const int64_t C = m->channels;
#pragma omp for collapse(2) schedule(static)
    for (int64_t i = 0; i < b->first[b->pieces]; i++)
        for (int64_t n = 0; n < mixtures; n++) {
            const float *own = z + i * C, *previous = previous_row(m, b, z, past, i, piece_of(b, i));
            float *mixed = in[n] + i * C;
            for (int64_t c = 0; c < C; c++) mixed[c] = own[c] + (previous[c] - own[c]) * mix[n][c];
        }
}

/* past (slots, C) gets the last z of each piece. */
static void keep_last(const common *m, const batch *b, const float *z, float *past) {
    const int64_t C = m->channels;
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < b->pieces; p++)
        memcpy(past + b->slot[p] * C, z + (b->first[p + 1] - 1) * C, C * sizeof(float));
}

/* z = norm(x), then the mixtures of z and the previous z, whose last z is kept for the next call. */
static void norm_mix(const common *m, const batch *b, const float *const norm[2], const float *x, float *z,
                     const float *const *mix, int64_t mixtures, float *const *in, float *past) {
    norm_rows(m, b, norm, x, z);
    mix_rows(m, b, z, past, mix, mixtures, in);
    keep_last(m, b, z, past);
}

/* hidden (rows, F) = relu(hidden)^2, compressed into lists for multiply_sparse() by `l`: most hidden channels of a trained
   model are zero after the activation. */
static void square_relu(const linear *l, float *hidden, int32_t *lists, int64_t rows) {
    const int64_t F = l->inputs;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row += ROWS) {
        const int64_t some = rows - row < ROWS ? rows - row : ROWS;
        float *block = hidden + row * F;
        for (int64_t n = 0; n < some * F; n++) block[n] = fmaxf(block[n], 0) * fmaxf(block[n], 0);
        compress(l, block, some, lists + row / ROWS * LIST(F));
    }
}

/* Weights of the channel-mix of RWKV-4, 5 and 6, whose mixtures are {key, receptance}. */
typedef struct {
    const float *const *norm, *const *mix;
    const linear *key, *receptance, *value;
} receptance_mix;

/* x += sigmoid(receptance) * value(relu(key)^2). z, r and each in[n] (rows, C), hidden and lists are scratch memory. */
static void receptance_channel_mix(const common *m, const batch *b, const receptance_mix *l, float *x, float *z,
                                   float *const *in, float *r, float *hidden, int32_t *lists, float *past) {
    const int64_t C = m->channels, count = b->first[b->pieces];
    norm_mix(m, b, l->norm, x, z, l->mix, 2, in, past);
    multiply(l->key, in[0], hidden, count);
    multiply(l->receptance, in[1], r, count);
#pragma omp barrier
    square_relu(l->value, hidden, lists, count);
    multiply_sparse(l->value, hidden, lists, z, count);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = i * C; c < (i + 1) * C; c++) x[c] += sigmoid_series(r[c]) * z[c];
}

/* x += z, of `count` rows of C channels. */
static void add_rows(float *x, const float *z, int64_t count, int64_t C) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = i * C; c < (i + 1) * C; c++) x[c] += z[c];
}

#endif
