/* exp(x) and sigmoid(x) = 1 / (1 + exp(-x)), each in two forms.

   exp_series and sigmoid_series are for the training kernels. There NaN must stay NaN, so these kernels are compiled
   without -ffinite-math-only. The C library then declares no vector form of expf, and one call for each number would be
   slow.

   expf and sigmoid are for the decode steps. They are compiled with all of -ffast-math, so the compiler calls the
   vector form of expf. */

#ifndef TIMEMIX_EXP_H
#define TIMEMIX_EXP_H

#include <math.h>

#include "ops/common/types.h"

/* exp(x) = 2^n exp(r), n = round(x / ln 2), r = x - n ln 2, |r| <= ln(2) / 2, with exp(r) by its Taylor series to r^7.
   x below -87 counts as -87. Relative error up to x = 88: 3e-7 with fused multiply-add, 4e-6 without. */
INLINE float exp_series(float x) {
    x = x < -87 ? -87 : x;
    const float n = rintf(x * 1.44269504f), r = x - n * 0.69314718f;
    /* 2^n: n + 127 in the exponent field of a float32. */
    const number power = {.bits = (uint32_t)((int32_t)n + 127) << 23};
    const float high = 1.f / 24 + r * (1.f / 120 + r * (1.f / 720 + r / 5040));
    return (1 + r * (1 + r * (0.5f + r * (1.f / 6 + r * high)))) * power.value;
}

/* sigmoid(x); x below -60 counts as -60, so that exp(-x) stays in range. */
INLINE float sigmoid_series(float x) { return 1 / (1 + exp_series(x < -60 ? 60 : -x)); }

INLINE float sigmoid(float x) { return 1 / (1 + expf(-x)); }

#endif
