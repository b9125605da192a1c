/* A token of the recurrence wkv4, for training (wkv4.c has the formulas) and for the decode step of RWKV-4. */

#ifndef TIMEMIX_WKV4_H
#define TIMEMIX_WKV4_H

#include "ops/common/exp.h"

/* Number of channels of a task. */
#define BLOCK 64

/* The exponent p of a state without tokens. */
#define EMPTY -1e38f

/* The state of a block of channels. */
typedef struct {
    float a[BLOCK], b[BLOCK], p[BLOCK];
} wkv4_state;

INLINE float larger(float x, float y) { return x > y ? x : y; }

/* (x - y) + z, with the rounding error of x - y, which counts if z cancels x - y. Exponents of about 60 have an error of
   4e-6, which would be the relative error of an exponential. */
INLINE float difference(float x, float y, float z) {
    const float s = x - y, own = s - x, error = (x - (s - own)) - (y + own);
    return (s + z) + error;
}

/* The factors e = exp(p - q) and n = exp(u + k - q) with q = max(p, u + k): one of them is 1. */
INLINE void wkv4_factors(float p, float u, float k, float *e, float *n) {
    const float more = difference(k, p, u);
    *e = exp_series(more > 0 ? -more : 0);
    *n = exp_series(more > 0 ? 0 : more);
}

INLINE void wkv4_load(wkv4_state *s, const float *from, int64_t C, int64_t count) {
    memcpy(s->a, from, count * sizeof(float));
    memcpy(s->b, from + C, count * sizeof(float));
    memcpy(s->p, from + 2 * C, count * sizeof(float));
}

INLINE void wkv4_store(const wkv4_state *s, float *to, int64_t C, int64_t count) {
    memcpy(to, s->a, count * sizeof(float));
    memcpy(to + C, s->b, count * sizeof(float));
    memcpy(to + 2 * C, s->p, count * sizeof(float));
}

INLINE void wkv4_forget(wkv4_state *s) {
    for (int64_t c = 0; c < BLOCK; c++) {
        s->a[c] = s->b[c] = 0;
        s->p[c] = EMPTY;
    }
}

/* The state after a token with keys k and values v. */
INLINE void wkv4_update(const wkv4_state *restrict s, wkv4_state *restrict next, const float *restrict w,
                        const float *restrict k, const float *restrict v, int64_t count) {
    for (int64_t c = 0; c < count; c++) {
        const float p = larger(s->p[c] + w[c], k[c]);
        const float m = exp_series(k[c] - p);
        float stay, fall;
        exp_factor(difference(s->p[c], p, w[c]), &stay, &fall);
        next->a[c] = stay * s->a[c] + (fall * s->a[c] + m * v[c]);
        next->b[c] = stay * s->b[c] + (fall * s->b[c] + m);
        next->p[c] = p;
    }
}

/* y of a token, from the state before the token. */
INLINE void wkv4_read(const wkv4_state *restrict s, const float *restrict u, const float *restrict k,
                      const float *restrict v, float *restrict y, int64_t count) {
    for (int64_t c = 0; c < count; c++) {
        float e, n;
        wkv4_factors(s->p[c], u[c], k[c], &e, &n);
        y[c] = (e * s->a[c] + n * v[c]) / (e * s->b[c] + n);
    }
}

#endif
