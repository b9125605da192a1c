/* LayerNorm and RMSNorm of one row, for the decode steps. The kernel for training is in norm_shift.c. */

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
    for (int64_t c = 0; c < C; c++) mean += x[c];
    mean /= C;
    for (int64_t c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean);
    const float scale = 1 / sqrtf(variance / C + epsilon);
    for (int64_t c = 0; c < C; c++) y[c] = (x[c] - mean) * scale * norm[0][c] + norm[1][c];
}

#endif
