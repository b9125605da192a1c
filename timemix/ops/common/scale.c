/* Bias and factor after the last product of a sublayer, forward and backward.

    y[t, c] = (x[t, c] + bias[c]) by,   by = gate[t, c] (channel-mix) or gamma(t) (time-mix)

   Backward:

    dx = dy by,   dbias[c] = sum_t dx,   dgate = dy (x + bias),   dgamma(t) = sum_c dy (x + bias) */

#include "ops/common/types.h"

/* One row (C,). The factor is gate, or *gamma if gate is NULL. */
INLINE void scale(enum type type, int64_t row, int64_t C, const void *x, const float *bias, const void *gate,
                  const float *gamma, void *y) {
    if (gate) {
#pragma omp simd
        for (int64_t c = 0; c < C; c++)
            store(type, y, row * C + c, load(type, gate, row * C + c) * (load(type, x, row * C + c) + bias[c]));
    } else {
#pragma omp simd
        for (int64_t c = 0; c < C; c++) store(type, y, row * C + c, *gamma * (load(type, x, row * C + c) + bias[c]));
    }
}

/* y (B, T, C) from x (B, T, C), bias (C,), and gate (B, T, C) or, if gate is NULL, gamma (T,). */
void timemix_scale(int64_t type, int64_t threads, int64_t B, int64_t T, int64_t C, const void *x, const float *bias,
                   const void *gate, const float *gamma, void *y) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < B * T; row++) {
        const float *of_row = gate ? NULL : gamma + row % T;
        if (type == FLOAT32) scale(FLOAT32, row, C, x, bias, gate, of_row, y);
        else scale(BFLOAT16, row, C, x, bias, gate, of_row, y);
    }
}

/* One row: computes dx (C,) and dgate (C,), and adds the row to dbias (C,). If gate is NULL, the function computes no
   dgate, and returns the part of the row in dgamma. */
INLINE float scale_back(enum type type, int64_t row, int64_t C, const void *x, const float *bias, const void *gate,
                        const float *gamma, const void *dy, void *dx, float *dbias, void *dgate) {
    float sum = 0;
    if (gate) {
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
            const float d = load(type, dy, row * C + c), gradient = d * load(type, gate, row * C + c);
            store(type, dgate, row * C + c, d * (load(type, x, row * C + c) + bias[c]));
            store(type, dx, row * C + c, gradient);
            dbias[c] += gradient;
        }
    } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < C; c++) {
            const float d = load(type, dy, row * C + c), gradient = d * *gamma;
            sum += d * (load(type, x, row * C + c) + bias[c]);
            store(type, dx, row * C + c, gradient);
            dbias[c] += gradient;
        }
    }
    return sum;
}

/* Computes dx (B, T, C), and dgate (B, T, C) if dgate is not NULL, else dgamma (B, T), which the caller sums over B.
   dbias (PARTS, C) are sums over parts of the rows. The parts are the same for any number of threads. */
void timemix_scale_back(int64_t type, int64_t threads, int64_t B, int64_t T, int64_t C, const void *x,
                        const float *bias, const void *gate, const float *gamma, const void *dy, void *dx, float *dbias,
                        void *dgate, float *dgamma) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < PARTS; part++) {
        float *db = dbias + part * C;
        memset(db, 0, C * sizeof(float));
        for (int64_t row = B * T * part / PARTS; row < B * T * (part + 1) / PARTS; row++) {
            const float *of_row = gate ? NULL : gamma + row % T;
            const float sum = type == FLOAT32 ? scale_back(FLOAT32, row, C, x, bias, gate, of_row, dy, dx, db, dgate)
                                              : scale_back(BFLOAT16, row, C, x, bias, gate, of_row, dy, dx, db, dgate);
            if (dgamma) dgamma[row] = sum;
        }
    }
}
