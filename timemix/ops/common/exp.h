/* exp(x) and sigmoid(x) = 1 / (1 + exp(-x)), each in two implementations.

   The training kernels use exp_series and sigmoid_series. NaN must stay NaN in training, so the training kernels are
   compiled without -ffinite-math-only. The C library then declares no vectorized expf, and one call of expf for each
   number would be slow.

   The decode steps use expf and sigmoid. The decode steps are compiled with all of -ffast-math, so the compiler calls
   the vectorized expf. */

#ifndef TIMEMIX_EXP_H
#define TIMEMIX_EXP_H

#include <math.h>

#include "ops/common/types.h"

/* exp(x) = 2^n exp(r), where n = round(x / ln 2), r = x - n ln 2, |r| <= ln(2) / 2, and exp(r) is a Taylor series to
   r^7. x is clamped to at least -87. Up to x = 88, the relative error is 3e-7 with fused multiply-add and 4e-6
   without fused multiply-add. */
INLINE float exp_series(float x) {
    x = x < -87 ? -87 : x;
    const float n = rintf(x * 1.44269504f), r = x - n * 0.69314718f;
    /* 2^n is n + 127 in the exponent field of a float32. */
    const number power = {.bits = (uint32_t)((int32_t)n + 127) << 23};
    const float high = 1.f / 24 + r * (1.f / 120 + r * (1.f / 720 + r / 5040));
    return (1 + r * (1 + r * (0.5f + r * (1.f / 6 + r * high)))) * power.value;
}

/* sigmoid(x), where x is clamped to at least -60 so that exp(-x) stays in range. */
INLINE float sigmoid_series(float x) { return 1 / (1 + exp_series(x < -60 ? 60 : -x)); }

INLINE float sigmoid(float x) { return 1 / (1 + expf(-x)); }

#endif
