/* Conversion of a curve by lag to a matrix of pairs of positions, and the gradient of this conversion.

    toeplitz:        W[h, i, j] = f_h(columns - rows + i - j), 0 for a negative lag
    diagonal sums:   sums[h, d] = sum over i - j = d of pairs[h, i, j]

   The diagonal sums of the gradient of W are the gradient of f. */

#include "ops/common/types.h"

/* matrices (H, rows, columns) from f (H, lags), where rows <= columns, and f is 0 at larger lags.

   Row i is f reversed, with lag 0 in column `last`. To the left of f are zeros for larger lags. To the right of f are
   zeros for future positions. */
void timemix_toeplitz(int64_t type, int64_t threads, int64_t H, int64_t rows, int64_t columns, int64_t lags,
                      const void *f, void *matrices) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < H * rows; row++) {
        const int64_t size = type == FLOAT32 ? 4 : 2, last = columns - rows + row % rows;
        const int64_t first = last < lags ? 0 : last - lags + 1, end = last + 1;
        const void *of_head = (const char *)f + row / rows * lags * size;
        char *y = (char *)matrices + row * columns * size;
        memset(y, 0, first * size);
        /* The numbers are copied without conversion, so that they stay bit-identical. */
        if (type == FLOAT32)
            for (int64_t j = first; j < end; j++) ((float *)y)[j] = ((const float *)of_head)[last - j];
        else
            for (int64_t j = first; j < end; j++) ((uint16_t *)y)[j] = ((const uint16_t *)of_head)[last - j];
        memset(y + end * size, 0, (columns - end) * size);
    }
}

/* sums (H, rows + columns - 1) over the diagonals i - j = 1 - columns, ..., rows - 1 of pairs (H, rows, columns).

   Each thread computes whole heads. The rows of a head are added in a fixed order. */
void timemix_diagonal_sums(int64_t type, int64_t threads, int64_t H, int64_t rows, int64_t columns, const void *pairs,
                           float *sums) {
    memset(sums, 0, H * (rows + columns - 1) * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t h = 0; h < H; h++)
        for (int64_t i = 0; i < rows; i++) {
            const void *row = from(type, pairs, (h * rows + i) * columns);
            /* y[-j] is the sum of diagonal i - j. */
            float *y = sums + h * (rows + columns - 1) + i + columns - 1;
            if (type == FLOAT32)
                for (int64_t j = 0; j < columns; j++) y[-j] += load(FLOAT32, row, j);
            else
                for (int64_t j = 0; j < columns; j++) y[-j] += load(BFLOAT16, row, j);
        }
}
