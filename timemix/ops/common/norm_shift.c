/* LayerNorm, then token-shift, forward and backward.

    unit[t, c] = (x[t, c] - mean[t]) r[t],   r[t] = 1 / sqrt(variance[t] + epsilon)
    z[t, c]    = unit[t, c] weight[c] + bias[c]
    y[t, c]    = z[t - d(c), c],   0 for t < d(c)

   d(c) is the shift distance of channel c. The backward formulas use dz[t, c] = dy[t + d(c), c] (0 past the last
   position) and g = dz weight:

    dweight[c] = sum_t dz unit,   dbias[c] = sum_t dz
    dx[t, c]   = r (g - mean_c(g) - unit mean_c(g unit)) */

#include "ops/common/norm.h"
#include "ops/common/types.h"

/* Token-shift: d(c) is g + 1 for edge[g] <= c < edge[g + 1], and 0 for c >= edge[groups]. */
typedef struct {
    int64_t groups;
    const int64_t *edge; /* (groups + 1,) */
    int64_t B, T, C;
} shift;

/* One row b T + t: reads x[b, t, :] and writes y[b, t + d(c), c]. The function writes to later rows instead of reading
   earlier rows, because the function knows the mean and variance of this row alone. */
INLINE void norm_shift(enum type type, const shift *s, int64_t row, const float *x, const float *weight,
                       const float *bias, float epsilon, void *y, float *mean, float *scale) {
    const int64_t C = s->C, t = row % s->T;
    norm_statistics(x + row * C, epsilon, C, mean + row, scale + row);
    const float m = mean[row], r = scale[row];
    for (int64_t g = 0; g <= s->groups; g++) {
        const int64_t first = s->edge[g], end = g < s->groups ? s->edge[g + 1] : C, d = g < s->groups ? g + 1 : 0;
        if (t + d < s->T) {
            void *out = into(type, y, (row + d) * C);
#pragma omp simd
            for (int64_t c = first; c < end; c++)
                store(type, out, c, (x[row * C + c] - m) * r * weight[c] + bias[c]);
        }
        /* The first d positions have no source. */
        if (t < d) memset(into(type, y, row * C + first), 0, (end - first) * BYTES(type));
    }
}

/* y (B, T, C) of `type` from x (B, T, C) float32, weight (C,) and bias (C,). The results mean (B, T) and
   scale = r (B, T) are for the backward pass. */
void timemix_norm_shift(int64_t type, int64_t threads, const shift *s, const float *x, const float *weight,
                        const float *bias, float epsilon, void *y, float *mean, float *scale) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < s->B * s->T; row++) {
        if (type == FLOAT32) norm_shift(FLOAT32, s, row, x, weight, bias, epsilon, y, mean, scale);
        else norm_shift(BFLOAT16, s, row, x, weight, bias, epsilon, y, mean, scale);
    }
}

/* One row, with m = mean[row] and r = scale[row]. The row is added to dweight (C,) and dbias (C,). g (C,) and unit (C,)
   are temporary. */
INLINE void norm_shift_back(enum type type, const shift *s, int64_t row, const float *x, const float *weight, float m,
                            float r, const void *dy, float *dx, float *dweight, float *dbias, float *g, float *unit) {
    const int64_t C = s->C;
    /* g = dz, which is the gradient of y at d(c) positions later. */
    for (int64_t n = 0; n <= s->groups; n++) {
        const int64_t first = s->edge[n], end = n < s->groups ? s->edge[n + 1] : C, d = n < s->groups ? n + 1 : 0;
        if (row % s->T + d < s->T) {
            const void *gradient = from(type, dy, (row + d) * C);
#pragma omp simd
            for (int64_t c = first; c < end; c++) g[c] = load(type, gradient, c);
        } else memset(g + first, 0, (end - first) * sizeof(float));
    }
    norm_back(x + row * C, weight, m, r, C, g, unit, dx + row * C, dweight, dbias);
}

/* dx (B, T, C) from dy (B, T, C). dweight (PARTS, C) and dbias (PARTS, C) are sums over parts of the rows. The parts
   are the same for any number of threads, so the sums are bit-identical. */
void timemix_norm_shift_back(int64_t type, int64_t threads, const shift *s, const float *x, const float *weight,
                             const float *mean, const float *scale, const void *dy, float *dx, float *dweight,
                             float *dbias) {
    const int64_t C = s->C, rows = s->B * s->T;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < PARTS; part++) {
        float *dw = dweight + part * C, *db = dbias + part * C, g[C], unit[C];
        memset(dw, 0, C * sizeof(float));
        memset(db, 0, C * sizeof(float));
        for (int64_t row = rows * part / PARTS; row < rows * (part + 1) / PARTS; row++) {
            if (type == FLOAT32)
                norm_shift_back(FLOAT32, s, row, x, weight, mean[row], scale[row], dy, dx, dw, db, g, unit);
            else norm_shift_back(BFLOAT16, s, row, x, weight, mean[row], scale[row], dy, dx, dw, db, g, unit);
        }
    }
}
