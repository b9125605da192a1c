/* Causal attention of one head over a cache of keys and values, and rotary positions, for the decode steps.

    y[t] = sum_{u<=t} exp(s[t, u]) v[u] / sum_{u<=t} exp(s[t, u]),   s[t, u] = q[t] . k[u] / sqrt(N)

   The keys and values of a head are (positions, N), and q and k are rotated by their positions.

   The sums run over blocks of BLOCK positions, which begin at multiples of BLOCK. The largest score so far, m, is
   subtracted from each score ("online softmax", arXiv 1805.02867), so each block is read once. After a block:

    m' = max(m, max_u s[u]),   c = exp(m - m')
    sum' = c sum + sum_u exp(s[u] - m'),   y' = c y + sum_u exp(s[u] - m') v[u]

   So the order of all sums of a target depends only on its position. */

#ifndef TIMEMIX_ATTENTION_H
#define TIMEMIX_ATTENTION_H

#include <math.h>

#include "ops/common/types.h"
#include "ops/common/vectors.h"

/* Positions of a block of keys and values. */
#define BLOCK 64
/* Number of consecutive targets that share the reading of a block from memory. */
#define TARGETS 16
/* Less than every score. The exponential of a difference from this number is 0. */
#define LOWEST -1e30f

/* The online softmax of a target: the largest score m, and the sum of the exponentials. */
typedef struct {
    float largest, sum;
} softmax;

/* y (N,) = scale times x (N,), with the first dimensions rotated in pairs. For i < pairs:

    (x[i], x[i + pairs])  ->  (x[i] cos[i] - x[i + pairs] sin[i],  x[i + pairs] cos[i] + x[i] sin[i])

   y may be x. */
LOCAL void rotate(const float *x, const float *cosine, const float *sine, int64_t pairs, int64_t N, float scale,
                  float *y) {
    for (int64_t i = 0; i < pairs; i++) {
        const float a = x[i], b = x[i + pairs];
        y[i] = scale * (a * cosine[i] - b * sine[i]);
        y[i + pairs] = scale * (b * cosine[i] + a * sine[i]);
    }
    for (int64_t i = 2 * pairs; i < N; i++) y[i] = scale * x[i];
}

/* scores[u] = q . keys[u] for u < count; keys (count, N). */
INLINE void score(const float *q, const float *keys, int64_t count, const int64_t N, float *scores) {
    for (int64_t u = 0; u < count; u++) {
        float product = 0;
#pragma omp simd reduction(+ : product)
        for (int64_t n = 0; n < N; n++) product += q[n] * keys[u * N + n];
        scores[u] = product;
    }
}

/* y[n] = fade y[n] + sum_{u < count} weights[u] values[u, n] for n < vectors WIDTH; values (count, N). `vectors` is a
   constant, so that the sums stay in registers. */
INLINE void add_vectors(const float *weights, const float *values, int64_t count, int64_t N, const int vectors,
                        float fade, float *y) {
    vec held[4];
    memcpy(held, y, vectors * sizeof(vec));
    for (int n = 0; n < vectors; n++) held[n] *= fade;
    for (int64_t u = 0; u < count; u++)
        for (int n = 0; n < vectors; n++) {
            vec x;
            memcpy(&x, values + u * N + n * WIDTH, sizeof x);
            held[n] += weights[u] * x;
        }
    memcpy(y, held, vectors * sizeof(vec));
}

/* y (N,) = fade y + sum_{u < count} weights[u] values[u]; values (count, N) */
INLINE void add_values(const float *weights, const float *values, int64_t count, const int64_t N, float fade,
                       float *y) {
    int64_t n = 0;
    for (; n + 4 * WIDTH <= N; n += 4 * WIDTH) add_vectors(weights, values + n, count, N, 4, fade, y + n);
    for (; n + 2 * WIDTH <= N; n += 2 * WIDTH) add_vectors(weights, values + n, count, N, 2, fade, y + n);
    for (; n + WIDTH <= N; n += WIDTH) add_vectors(weights, values + n, count, N, 1, fade, y + n);
    for (; n < N; n++) {
        float sum = fade * y[n];
        for (int64_t u = 0; u < count; u++) sum += weights[u] * values[u * N + n];
        y[n] = sum;
    }
}

/* Adds a block of keys and values (count, N), count <= BLOCK, to the softmax and the output y (N,) of a target. */
INLINE void attend_block(const float *q, const float *keys, const float *values, int64_t count, const int64_t N,
                         softmax *s, float *y) {
    float scores[BLOCK], largest = s->largest, sum = 0;
    score(q, keys, count, N, scores);
    /* The loops below have a constant length, so that the compiler vectorizes expf without a rest. */
    for (int64_t u = count; u < BLOCK; u++) scores[u] = LOWEST;
    for (int u = 0; u < BLOCK; u++) largest = scores[u] > largest ? scores[u] : largest;
    for (int u = 0; u < BLOCK; u++) scores[u] = expf(scores[u] - largest);
    for (int u = 0; u < BLOCK; u++) sum += scores[u];
    const float fade = expf(s->largest - largest);
    s->largest = largest;
    s->sum = fade * s->sum + sum;
    add_values(scores, values, count, N, fade, y);
}

/* attend_block for any N. The usual sizes are constants, whose loops the compiler unrolls. */
static void attend_some(const float *q, const float *keys, const float *values, int64_t count, int64_t N, softmax *s,
                        float *y) {
    if (N == 16) attend_block(q, keys, values, count, 16, s, y);
    else if (N == 32) attend_block(q, keys, values, count, 32, s, y);
    else if (N == 64) attend_block(q, keys, values, count, 64, s, y);
    else if (N == 128) attend_block(q, keys, values, count, 128, s, y);
    else attend_block(q, keys, values, count, N, s, y);
}

/* y[i] (N,) of consecutive targets i < count <= TARGETS, at the positions position + i. The queries q[i] (N,) are
   rotated and scaled by 1/sqrt(N). In q and y, a target is `size` numbers from the next target. keys and values
   (positions, N) contain all positions up to the last target. */
LOCAL void attend(const float *q, const float *keys, const float *values, int64_t position, int64_t count, int64_t N,
                  int64_t size, float *y) {
    softmax s[TARGETS];
    for (int64_t i = 0; i < count; i++) {
        s[i] = (softmax){LOWEST, 0};
        memset(y + i * size, 0, N * sizeof(float));
    }
    for (int64_t begin = 0; begin < position + count; begin += BLOCK)
        for (int64_t i = 0; i < count; i++) {
            const int64_t left = position + i + 1 - begin, some = left < BLOCK ? left : BLOCK;
            if (some > 0)
                attend_some(q + i * size, keys + begin * N, values + begin * N, some, N, s + i, y + i * size);
        }
    for (int64_t i = 0; i < count; i++)
        for (int64_t n = 0; n < N; n++) y[i * size + n] /= s[i].sum;
}

#endif
