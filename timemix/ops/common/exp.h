/* exp(x), exp(x) - 1, and sigmoid(x) = 1 / (1 + exp(-x)); exp and sigmoid in two implementations.

   The training kernels use exp_series and sigmoid_series. NaN must stay NaN in training, so the training kernels are
   compiled without -ffinite-math-only. The C library then declares no vectorized expf, and one call of expf for each
   number would be slow.

   The decode steps are compiled with -ffinite-math-only, so the compiler calls the vectorized expf. They use expf and
   sigmoid almost everywhere. */

#ifndef TIMEMIX_EXP_H
#define TIMEMIX_EXP_H

#include <math.h>

#include "ops/common/types.h"

/* The numbers exp(r) - 1 and power = 2^n for exp(x) = 2^n exp(r), where n = round(x / ln 2) and r = x - n ln 2, so that
   |r| <= ln(2) / 2. */
INLINE float exp_rest(float x, float *power) {
    x = x < -87 ? -87 : x;
    const float n = rintf(x * 1.44269504f), r = x - n * 0.69314718f;
    /* 2^n is n + 127 in the exponent field of a float32. */
    *power = (number){.bits = (uint32_t)((int32_t)n + 127) << 23}.value;
    const float high = 1.f / 24 + r * (1.f / 120 + r * (1.f / 720 + r / 5040));
    return r * (1 + r * (0.5f + r * (1.f / 6 + r * high)));
}

/* exp(x), by a Taylor series of exp(r) to r^7. x is clamped to at least -87. Up to x = 88, the relative error is 3e-7
   with fused multiply-add and 4e-6 without fused multiply-add. */
INLINE float exp_series(float x) {
    float power;
    const float rest = exp_rest(x, &power);
    return (1 + rest) * power;
}

/* exp(x) - 1, with a small relative error also for x near 0. */
INLINE float expm1_series(float x) {
    float power;
    const float rest = exp_rest(x, &power);
    return (power - 1) + rest * power;
}

/* The factors c and m for which c s + m s is exp(w) s, for a sum s that decays by exp(w) at each token. For w above -ln 2,
   c = 1 and m = exp(w) - 1, because the rounding error of a factor near 1 would be equal at every token, and add up.
   Otherwise c = 0 and m = exp(w), because small factors would lose their digits in 1 + m. A file that uses c and m is
   compiled without -fassociative-math, which would replace c s + m s by (c + m) s. */
INLINE void exp_factor(float w, float *c, float *m) {
    float power;
    const float rest = exp_rest(w, &power);
    *c = w > -0.69314718f ? 1 : 0;
    *m = (power - *c) + rest * power;
}

/* exp_factor for w (N,): c and m (N,). */
INLINE void exp_factors(int64_t N, const float *w, float *c, float *m) {
#pragma omp simd
    for (int64_t j = 0; j < N; j++) exp_factor(w[j], c + j, m + j);
}

/* sigmoid(x), where x is clamped to at least -60 so that exp(-x) stays in range. */
INLINE float sigmoid_series(float x) { return 1 / (1 + exp_series(x < -60 ? 60 : -x)); }

/* As sigmoid_series. With -ffast-math, 1 / infinity is NaN, because the compiler computes 1 / y by a Newton step. */
INLINE float sigmoid(float x) { return 1 / (1 + expf(fminf(-x, 60))); }

#endif
