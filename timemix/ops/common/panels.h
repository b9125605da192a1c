/* Linear maps of a few rows, at the speed at which the weights are read from memory.

    y[r, o] = scale[o] sum_i x[r, i] weight[o, i] + bias[o]

   x, y, scale and bias are float32; weight is float32, bfloat16 or int8. scale is for int8 alone.

   Layout: weight (outputs, inputs) -> (panels, inputs, PANEL). A panel holds, for each input, the weights of PANEL
   outputs side by side. So a product reads one continuous stream, and needs no sum across the lanes of a vector. Zeros
   fill the last panel.

   The order of summation over inputs is the same for any number of threads. */

#ifndef TIMEMIX_PANELS_H
#define TIMEMIX_PANELS_H

#include "ops/common/types.h"
#include "ops/common/vectors.h"

/* Two vectors of outputs: their sums are independent, so the second hides the latency of the first. */
#define PANEL (2 * WIDTH)

/* Distance of prefetching in bytes, from the weights in use. */
#ifndef AHEAD
#define AHEAD 8192
#endif

typedef struct {
    const void *weight; /* (panels, inputs, PANEL) */
    const float *scale; /* (panels * PANEL,), or NULL for 1 */
    const float *bias;  /* (panels * PANEL,), or NULL for 0 */
    int64_t outputs, inputs;
} linear;

/* y[r, first + o] = scale sum_i x[r, i] weight[first + o, i] + bias, for r < rows and o < count <= PANEL.

   x (rows, inputs), y (rows, outputs); `first` is a multiple of PANEL. `rows` (up to 6) and `unroll` (1 or 2) are
   constants: all sums are then held in registers, each weight is loaded once for all rows. */
INLINE void multiply_panel(const linear *l, int64_t first, enum type type, const float *x, float *y, int64_t count,
                           const int rows, const int unroll) {
    const int64_t inputs = l->inputs, at = first * inputs;
    const char *ahead = (const char *)l->weight + at * BYTES(type) + AHEAD;
    /* (unroll, rows, vectors of a panel) */
    vec sum[2][6][2] = {{{{0}}}};
    int64_t i = 0;
    for (; i + unroll <= inputs; i += unroll)
        for (int k = 0; k < unroll; k++) {
            __builtin_prefetch(ahead + (i + k) * PANEL * BYTES(type));
            if (PANEL * BYTES(type) > 64) __builtin_prefetch(ahead + (i + k) * PANEL * BYTES(type) + 64);
            const vec a = load_vector(l->weight, at + (i + k) * PANEL, type);
            const vec b = load_vector(l->weight, at + (i + k) * PANEL + WIDTH, type);
            for (int r = 0; r < rows; r++) {
                sum[k][r][0] += a * x[r * inputs + i + k];
                sum[k][r][1] += b * x[r * inputs + i + k];
            }
        }
    for (; i < inputs; i++)
        for (int r = 0; r < rows; r++) {
            sum[0][r][0] += load_vector(l->weight, at + i * PANEL, type) * x[r * inputs + i];
            sum[0][r][1] += load_vector(l->weight, at + i * PANEL + WIDTH, type) * x[r * inputs + i];
        }
    for (int r = 0; r < rows; r++) {
        float all[PANEL];
        for (int half = 0; half < 2; half++) {
            vec one = sum[0][r][half];
            if (unroll == 2) one += sum[1][r][half];
            memcpy(all + half * WIDTH, &one, sizeof one);
        }
        for (int o = 0; o < PANEL; o++)
            all[o] = all[o] * (l->scale ? l->scale[first + o] : 1) + (l->bias ? l->bias[first + o] : 0);
        if (count == PANEL) memcpy(y + r * l->outputs + first, all, sizeof all);
        else memcpy(y + r * l->outputs + first, all, count * sizeof(float));
    }
}

/* The same for any number of rows: six at a time (12 sums fit the registers), then the rest. One or two rows have too
   few independent sums to hide the latency of multiply-add, hence two inputs at a time. */
INLINE void multiply_panel_rows(const linear *l, int64_t first, enum type type, const float *x, float *y, int64_t count,
                                int64_t rows) {
    for (; rows >= 6; rows -= 6, x += 6 * l->inputs, y += 6 * l->outputs)
        multiply_panel(l, first, type, x, y, count, 6, 1);
    switch (rows) {
    case 1: multiply_panel(l, first, type, x, y, count, 1, 2); break;
    case 2: multiply_panel(l, first, type, x, y, count, 2, 2); break;
    case 3: multiply_panel(l, first, type, x, y, count, 3, 1); break;
    case 4: multiply_panel(l, first, type, x, y, count, 4, 1); break;
    case 5: multiply_panel(l, first, type, x, y, count, 5, 1); break;
    }
}

/* y (rows, outputs) = x (rows, inputs) weight^T + bias; `type` is that of the weights.

   For use inside a parallel region: the threads share the panels. There is no barrier at the end, so that several maps
   can follow one another; the caller adds it. */
LOCAL void multiply(const linear *l, int64_t type, const float *x, float *y, int64_t rows) {
    const int64_t panels = (l->outputs + PANEL - 1) / PANEL;
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < panels; n++) {
        const int64_t first = n * PANEL, left = l->outputs - first, count = left < PANEL ? left : PANEL;
        if (type == FLOAT32) multiply_panel_rows(l, first, FLOAT32, x, y, count, rows);
        else if (type == BFLOAT16) multiply_panel_rows(l, first, BFLOAT16, x, y, count, rows);
        else multiply_panel_rows(l, first, INT8, x, y, count, rows);
    }
}

#endif
