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
        const float p = larger(s->p[c] + w[c], k[c]), fall = expm1_series((s->p[c] - p) + w[c]), m = exp_series(k[c] - p);
        next->a[c] = s->a[c] + (fall * s->a[c] + m * v[c]);
        next->b[c] = s->b[c] + (fall * s->b[c] + m);
        next->p[c] = p;
    }
}

/* y of a token, from the state before the token. */
INLINE void wkv4_read(const wkv4_state *restrict s, const float *restrict u, const float *restrict k,
                      const float *restrict v, float *restrict y, int64_t count) {
    for (int64_t c = 0; c < count; c++) {
        const float now = u[c] + k[c], q = larger(s->p[c], now);
        const float e = exp_series(s->p[c] - q), n = exp_series(now - q);
        y[c] = (e * s->a[c] + n * v[c]) / (e * s->b[c] + n);
    }
}

#endif
