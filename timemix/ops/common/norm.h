/* LayerNorm and RMSNorm of one row x (C,). The decode steps call normalize(). The training kernels norm_shift.c and
   mixtures.c call the other functions. */

#ifndef TIMEMIX_NORM_H
#define TIMEMIX_NORM_H

#include <math.h>

#include "ops/common/types.h"

/* y (C,) = x / sqrt(mean(x^2) + epsilon) weight */
LOCAL void normalize_rms(const float *x, const float *weight, float epsilon, int64_t C, float *y) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < C; c++) squares += x[c] * x[c];
    const float scale = 1 / sqrtf(squares / C + epsilon);
    for (int64_t c = 0; c < C; c++) y[c] = x[c] * scale * weight[c];
}

/* y (C,) = (x - mean) / sqrt(variance + epsilon) weight + bias; norm is {weight, bias}. RMSNorm if there is no bias. */
LOCAL void normalize(const float *x, const float *const norm[2], float epsilon, int64_t C, float *y) {
    if (!norm[1]) {
        normalize_rms(x, norm[0], epsilon, C, y);
        return;
    }
    float mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t c = 0; c < C; c++) mean += x[c];
    mean /= C;
#pragma omp simd reduction(+ : variance)
    for (int64_t c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean);
    const float scale = 1 / sqrtf(variance / C + epsilon);
    for (int64_t c = 0; c < C; c++) y[c] = (x[c] - mean) * scale * norm[0][c] + norm[1][c];
}

/* The mean, and scale = 1 / sqrt(variance + epsilon). */
INLINE void norm_statistics(const float *x, float epsilon, int64_t C, float *mean, float *scale) {
    float m = 0, variance = 0;
    for (int64_t c = 0; c < C; c++) m += x[c];
    m /= C;
    for (int64_t c = 0; c < C; c++) variance += (x[c] - m) * (x[c] - m);
    *mean = m;
    *scale = 1 / sqrtf(variance / C + epsilon);
}

/* Backward, from the gradient g (C,) of the normalized row: with unit = (x - mean) scale,

    dx = scale (g weight - mean_c(g weight) - unit mean_c(g weight unit))

   Adds g unit to dweight (C,), and g to dbias (C,). Overwrites g and unit (C,). */
INLINE void norm_back(const float *x, const float *weight, float mean, float scale, int64_t C, float *g, float *unit,
                      float *dx, float *dweight, float *dbias) {
    float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t c = 0; c < C; c++) {
        unit[c] = (x[c] - mean) * scale;
        dweight[c] += g[c] * unit[c];
        dbias[c] += g[c];
        g[c] *= weight[c];
        sum += g[c];
        product += g[c] * unit[c];
    }
#pragma omp simd
    for (int64_t c = 0; c < C; c++) dx[c] = scale * (g[c] - (sum + unit[c] * product) / C);
}

#endif
