/* LayerNorm of one row, for the decode steps. The kernel for training is in norm_shift.c. */

#ifndef TIMEMIX_NORM_H
#define TIMEMIX_NORM_H

#include <math.h>

#include "ops/common/types.h"

/* y (C,) = (x - mean) / sqrt(variance + epsilon) weight + bias; norm is {weight, bias}. */
LOCAL void normalize(const float *x, const float *const norm[2], float epsilon, int64_t C, float *y) {
    float mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t c = 0; c < C; c++) mean += x[c];
    mean /= C;
#pragma omp simd reduction(+ : variance)
    for (int64_t c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean);
    const float scale = 1 / sqrtf(variance / C + epsilon);
    for (int64_t c = 0; c < C; c++) y[c] = (x[c] - mean) * scale * norm[0][c] + norm[1][c];
}

#endif
