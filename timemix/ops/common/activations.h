/* Activations of the channel-mix.

    gelu(x)  = x Phi(x), where Phi is the cumulative distribution function of the normal distribution
    mish(x)  = x tanh(ln(1 + exp(x)))
    relu2(x) = max(x, 0)^2
    silu(x)  = x sigmoid(x)

   The training kernels use activate(), which also computes the derivative. Decode steps use multiply_activated(). */

#ifndef TIMEMIX_ACTIVATIONS_H
#define TIMEMIX_ACTIVATIONS_H

#include <math.h>

#include "ops/common/exp.h"
#include "ops/common/types.h"

/* The activations, in the order of ACTIVATION_KINDS in fused.py. */
enum activation { GELU, MISH, RELU2, SILU };

/* Phi(x) = (1 + erf(x / sqrt(2))) / 2, and the density exp(-x^2 / 2) / sqrt(2 pi).

   With z = |x| / sqrt(2) and s = 1 / (1 + 0.3275911 z), 1 - erf(z) = exp(-z^2) (a1 s + ... + a5 s^5), with an error
   below 1.5e-7 (Abramowitz and Stegun 7.1.26). Both results use the same exponential. */
INLINE float normal_distribution(float x, float *density) {
    const float z = fabsf(x) * 0.70710678f, s = 1 / (1 + 0.3275911f * z), e = exp_series(-z * z);
    const float high = 1.421413741f + s * (-1.453152027f + s * 1.061405429f);
    const float tail = 0.5f * e * s * (0.254829592f + s * (-0.284496736f + s * high));
    *density = 0.39894228f * e;
    return x < 0 ? tail : 1 - tail;
}

/* act(x), and slope = act'(x). */
INLINE float activate(enum activation kind, float x, float *slope) {
    if (kind == GELU) {
        /* gelu' = Phi(x) + x density(x). */
        float density;
        const float below = normal_distribution(x, &density);
        *slope = below + x * density;
        return x * below;
    }
    if (kind == MISH) {
        /* With e = exp(x), n = e (e + 2) and d = n + 2: mish = x n / d and mish' = n / d + 4 x e (1 + e) / d^2. Both
           formulas together take one exponential and one division. For x > 20, mish(x) = x in float32, so x is clamped
           to keep e^2 in range. */
        const float e = exp_series(x > 20 ? 20 : x), n = e * (e + 2), inverse = 1 / (n + 2);
        *slope = (n + 4 * x * e * (1 + e) * inverse) * inverse;
        return x * n * inverse;
    }
    if (kind == RELU2) {
        const float positive = x < 0 ? 0 : x;
        *slope = 2 * positive;
        return positive * positive;
    }
    /* silu' = s (1 + x (1 - s)), s = sigmoid(x). */
    const float s = sigmoid_series(x);
    *slope = s * (1 + x * (1 - s));
    return x * s;
}

/* Calls a function with the activation as a constant, so that the loops of the function have no branch. */
#define OF_KIND(function, type, kind, ...)                       \
    switch (kind) {                                              \
    case GELU: function(type, GELU, __VA_ARGS__); break;         \
    case MISH: function(type, MISH, __VA_ARGS__); break;         \
    case RELU2: function(type, RELU2, __VA_ARGS__); break;       \
    default: function(type, SILU, __VA_ARGS__);                  \
    }

/* mish(x) for the decode steps, by the formula in activate() */
INLINE float mish(float x) {
    const float e = expf(fminf(x, 20)), n = e * (e + 2);
    return x * n / (n + 2);
}

/* y[i] = act(key[i]) value[i] for i < n. Each activation has its own loop, so that the compiler vectorizes the loop. */
LOCAL void multiply_activated(const float *key, const float *value, int64_t n, int64_t kind, float *y) {
    switch (kind) {
    case GELU:
        for (int64_t i = 0; i < n; i++) y[i] = key[i] * 0.5f * (1 + erff(key[i] * 0.70710678f)) * value[i];
        break;
    case MISH:
        for (int64_t i = 0; i < n; i++) y[i] = mish(key[i]) * value[i];
        break;
    case RELU2:
        for (int64_t i = 0; i < n; i++) y[i] = fmaxf(key[i], 0) * fmaxf(key[i], 0) * value[i];
        break;
    default:
        for (int64_t i = 0; i < n; i++) y[i] = key[i] * sigmoid(key[i]) * value[i];
    }
}

#endif
