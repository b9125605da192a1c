/* LayerNorm, then mixtures of each token with the previous token, forward and backward.

    unit[t] = (x[t] - mean[t]) r[t],   r[t] = 1 / sqrt(variance[t] + epsilon)
    z[t]    = unit[t] weight + bias
    y_i[t]  = z[t] + (z[t-1] - z[t]) mix_i   for each mixture i,   z[-1] = last

   Backward, with d_i the gradient of y_i:

    dz[t] = sum_i d_i[t] (1 - mix_i) + sum_i d_i[t+1] mix_i   (the second sum is 0 past the last position)
    dmix_i = sum_t d_i[t] (z[t-1] - z[t]),   dlast = sum_i d_i[0] mix_i

   dweight, dbias and dx follow from dz as in norm_shift.c. z is computed again from x. At a reset t, z[t-1] is replaced
   by 0, so the sum over d_i[t] mix_i is 0. */

#include "ops/common/norm.h"
#include "ops/common/types.h"

typedef struct {
    int64_t count, B, T, C;
    const float *x, *weight, *bias, *mix, *last; /* x (B, T, C), mix (count, C), last (B, C) or NULL for 0 */
    const uint8_t *resets;                       /* (B, T), or NULL */
} mixing;

/* z (C,) of a row b T + t, from its mean and r. */
INLINE void normed(const mixing *s, int64_t row, float mean, float r, float *z) {
    const float *x = s->x + row * s->C;
#pragma omp simd
    for (int64_t c = 0; c < s->C; c++) z[c] = (x[c] - mean) * r * s->weight[c] + s->bias[c];
}

INLINE int is_reset(const mixing *s, int64_t row) { return s->resets && s->resets[row]; }

/* z[t-1] (C,) of a row b T + t that is a reset or has t = 0. */
INLINE void before_first(const mixing *s, int64_t row, float *z) {
    if (s->last && !is_reset(s, row)) memcpy(z, s->last + row / s->T * s->C, s->C * sizeof(float));
    else memset(z, 0, s->C * sizeof(float));
}

/* y[i] (B, T, C) of `type` for each mixture i. The results mean and scale = r (B, T) are for the backward pass. */
void timemix_mixtures(int64_t type, int64_t threads, const mixing *s, float epsilon, void *const *y, float *mean,
                      float *scale) {
    const int64_t C = s->C, rows = s->B * s->T;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < PARTS; part++) {
        const int64_t first = rows * part / PARTS;
        float z[2][C], m, r;
        for (int64_t row = first; row < rows * (part + 1) / PARTS; row++) {
            float *now = z[row % 2], *before = z[1 - row % 2];
            if (row % s->T == 0 || is_reset(s, row)) before_first(s, row, before);
            else if (row == first) {
                norm_statistics(s->x + (row - 1) * C, epsilon, C, &m, &r);
                normed(s, row - 1, m, r, before);
            }
            norm_statistics(s->x + row * C, epsilon, C, mean + row, scale + row);
            normed(s, row, mean[row], scale[row], now);
            for (int64_t i = 0; i < s->count; i++) {
                const float *mix = s->mix + i * C;
                void *out = into(type, y[i], row * C);
                if (type == FLOAT32) {
#pragma omp simd
                    for (int64_t c = 0; c < C; c++) store(FLOAT32, out, c, now[c] + (before[c] - now[c]) * mix[c]);
                } else {
#pragma omp simd
                    for (int64_t c = 0; c < C; c++) store(BFLOAT16, out, c, now[c] + (before[c] - now[c]) * mix[c]);
                }
            }
        }
    }
}

/* One row b T + t: computes the gradients that the row gives to z[t] in now (C,) and to z[t-1] in earlier (C,). If dmix
   is not NULL, adds d_i (z[t-1] - z[t]) to dmix (count, C). */
INLINE void mixtures_back(enum type type, const mixing *s, int64_t row, const void *const *dy, const float *z_before,
                          const float *z_now, float *now, float *earlier, float *dmix) {
    memset(now, 0, s->C * sizeof(float));
    memset(earlier, 0, s->C * sizeof(float));
    for (int64_t i = 0; i < s->count; i++) {
        const float *mix = s->mix + i * s->C;
        const void *gradient = from(type, dy[i], row * s->C);
#pragma omp simd
        for (int64_t c = 0; c < s->C; c++) {
            const float d = load(type, gradient, c), shared = d * mix[c];
            earlier[c] += shared;
            now[c] += d - shared;
        }
        if (!dmix) continue;
        float *sum = dmix + i * s->C;
#pragma omp simd
        for (int64_t c = 0; c < s->C; c++) sum[c] += load(type, gradient, c) * (z_before[c] - z_now[c]);
    }
}

/* The rows of a part in the order of time. dz[t] is complete after row t + 1, so dx of a row is computed one row
   later. */
INLINE void mixtures_back_part(enum type type, const mixing *s, int64_t first, int64_t end, const float *mean,
                               const float *scale, const void *const *dy, float *dx, float *dlast, float *dmix,
                               float *dweight, float *dbias) {
    const int64_t C = s->C, T = s->T;
    float z[2][C], dz[2][C], earlier[C], unit[C];
    for (int64_t row = first; row <= end; row++) {
        const int64_t before = row - 1;
        float *z_now = z[row % 2], *z_before = z[1 - row % 2], *dz_now = dz[row % 2], *dz_before = dz[1 - row % 2];
        /* The row after the part only completes dz of the last row. */
        if (row == end && (row == first || row % T == 0)) break;
        if (row < end) {
            if (row % T == 0 || is_reset(s, row)) before_first(s, row, z_before);
            else if (row == first) normed(s, before, mean[before], scale[before], z_before);
            normed(s, row, mean[row], scale[row], z_now);
        }
        mixtures_back(type, s, row, dy, z_before, z_now, dz_now, earlier, row < end ? dmix : NULL);
        if (is_reset(s, row)) memset(earlier, 0, C * sizeof(float));
        if (row % T == 0) {
            if (dlast) memcpy(dlast + row / T * C, earlier, C * sizeof(float));
        } else if (row > first) {
            for (int64_t c = 0; c < C; c++) dz_before[c] += earlier[c];
            norm_back(s->x + before * C, s->weight, mean[before], scale[before], C, dz_before, unit, dx + before * C,
                      dweight, dbias);
        }
        if (row < end && row % T == T - 1)
            norm_back(s->x + row * C, s->weight, mean[row], scale[row], C, dz_now, unit, dx + row * C, dweight, dbias);
    }
}

/* dx (B, T, C) from the gradients dy[i] (B, T, C). dlast (B, C) is NULL if last is NULL. dmix (PARTS, count, C),
   dweight and dbias (PARTS, C) hold zeros on entry, and are sums over parts of the rows. */
void timemix_mixtures_back(int64_t type, int64_t threads, const mixing *s, const float *mean, const float *scale,
                           const void *const *dy, float *dx, float *dlast, float *dmix, float *dweight, float *dbias) {
    const int64_t C = s->C, rows = s->B * s->T;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < PARTS; part++) {
        const int64_t first = rows * part / PARTS, end = rows * (part + 1) / PARTS;
        float *sums = dmix + part * s->count * C, *dw = dweight + part * C, *db = dbias + part * C;
        if (type == FLOAT32) mixtures_back_part(FLOAT32, s, first, end, mean, scale, dy, dx, dlast, sums, dw, db);
        else mixtures_back_part(BFLOAT16, s, first, end, mean, scale, dy, dx, dlast, sums, dw, db);
    }
}
