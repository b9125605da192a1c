/* Linear maps of rows with many zeros, such as the hidden channels after relu^2.

    y[r, o] = scale[o] sum_{i: x[., i] != 0} x[r, i] weight[o, i]

   The rows are divided into blocks of ROWS rows, as in panels.h. The sum of a block leaves out the inputs i at which all
   rows of the block are zero, so their weights are not read from memory. A product with zero changes no sum, so the
   result is that of multiply(), for any other rows of the block.

   Reading parts of the weights is slower per byte than reading all weights. So blocks with few zeros leave out nothing. */

#ifndef TIMEMIX_SPARSE_H
#define TIMEMIX_SPARSE_H

#include "ops/common/panels.h"

/* Number of inputs whose weights are prefetched. */
#define FETCHED(type) (AHEAD / (PANEL * BYTES(type)))

/* Numbers of a block's list: the length, the inputs, and inputs to prefetch after the last one. */
#define LIST(inputs) (1 + (inputs) + FETCHED(INT8))

/* The length of the list of a block that leaves out nothing. Its rows are not compressed. */
#define ALL -1

/* Whether the weights of each input can be read alone. */
INLINE int can_skip(const linear *l) { return l->type <= INT8; }

/* Lists the inputs at which x (rows, inputs) is not zero in all rows, in ascending order. Then moves their columns to the
   front of x, and rounds x if the product needs it. */
LOCAL void compress(const linear *l, float *x, int64_t rows, int32_t *list) {
    const int64_t inputs = l->inputs;
    int32_t *index = list + 1;
    int64_t length = 0;
    if (!can_skip(l)) return;
    /* index[i] is first 1 if an input i is not zero. */
    memset(index, 0, inputs * sizeof *index);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < inputs; i++) index[i] |= x[r * inputs + i] != 0;
    for (int64_t i = 0; i < inputs; i++) length += index[i];
    /* Measured on an EPYC: with one row from memory, 2 of 5 weights take about as long as all weights. */
    list[0] = 5 * length > 2 * inputs ? ALL : length;
    length = 0;
    for (int64_t i = 0; list[0] != ALL && i < inputs; i++) {
        const int any = index[i];
        index[length] = i;
        length += any;
    }
    for (int64_t r = 0; r < rows; r++) {
        float *row = x + r * inputs;
        for (int64_t n = 0; n < length; n++) row[n] = row[index[n]];
        if (ROUNDS(l->type)) round_row(row, list[0] == ALL ? inputs : length, row);
    }
    /* After the last input, the same inputs of the next panel follow. */
    for (int64_t n = 0; list[0] != ALL && n < FETCHED(INT8); n++)
        index[length + n] = length ? inputs + index[n % length] : 0;
}

/* multiply_panel() for compressed rows. */
INLINE void multiply_sparse_panel(const linear *l, int64_t first, enum type type, const float *x, const int32_t *list,
                                  float *y, int64_t count, const int rows) {
    const int64_t inputs = l->inputs, at = first * inputs, length = list[0];
    const int32_t *index = list + 1;
    const float *scale = l->scale;
    vec sum[ROWS][VECTORS] = {{{0}}};
    if (ROUNDS(type)) {
        multiply_pairs(l, first, x, index, length, y, count, rows);
        return;
    }
    for (int64_t n = 0; n < length; n++) {
        const int64_t here = at + index[n] * PANEL;
        prefetch(type, l->weight, at + (int64_t)index[n + FETCHED(type)] * PANEL, PANEL);
        vec weight[VECTORS];
        for (int v = 0; v < VECTORS; v++) weight[v] = load_vector(l->weight, here + v * WIDTH, type);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++) sum[r][v] += weight[v] * x[r * inputs + n];
    }
    for (int r = 0; r < rows; r++) {
        float all[PANEL];
        memcpy(all, sum[r], sizeof all);
        for (int o = 0; o < PANEL; o++) all[o] *= scale ? scale[first + o] : 1;
        memcpy(y + r * l->outputs + first, all, count * sizeof(float));
    }
}

/* multiply_sparse_panel() for a variable number of rows, 1 to ROWS. */
INLINE void multiply_sparse_block(const linear *l, int64_t first, enum type type, const float *x, const int32_t *list,
                                  float *y, int64_t count, int64_t rows) {
    if (list[0] == ALL) {
        multiply_block(l, first, type, x, y, count, rows);
        return;
    }
    switch (rows) {
    case 1: multiply_sparse_panel(l, first, type, x, list, y, count, 1); break;
    case 2: multiply_sparse_panel(l, first, type, x, list, y, count, 2); break;
#if ROWS > 3
    case 3: multiply_sparse_panel(l, first, type, x, list, y, count, 3); break;
    case 4: multiply_sparse_panel(l, first, type, x, list, y, count, 4); break;
    case 5: multiply_sparse_panel(l, first, type, x, list, y, count, 5); break;
#endif
    default: multiply_sparse_panel(l, first, type, x, list, y, count, ROWS);
    }
}

/* multiply() for a map without bias. compress() has compressed each block of x, into lists (blocks, LIST(inputs)). */
LOCAL void multiply_sparse(const linear *l, const float *x, const int32_t *lists, float *y, int64_t rows) {
    const int64_t panels = (l->outputs + PANEL - 1) / PANEL, blocks = (rows + ROWS - 1) / ROWS;
    if (!can_skip(l)) {
        multiply(l, x, y, rows);
        return;
    }
#pragma omp for collapse(2) schedule(static) nowait
    for (int64_t n = 0; n < panels; n++)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = n * PANEL, left = l->outputs - first, count = left < PANEL ? left : PANEL;
            const int64_t row = block * ROWS, some = rows - row < ROWS ? rows - row : ROWS;
            const float *in = x + row * l->inputs;
            const int32_t *list = lists + block * LIST(l->inputs);
            float *out = y + row * l->outputs;
            if (l->type == FLOAT32) multiply_sparse_block(l, first, FLOAT32, in, list, out, count, some);
            else if (l->type == BFLOAT16) multiply_sparse_block(l, first, BFLOAT16, in, list, out, count, some);
            else multiply_sparse_block(l, first, INT8, in, list, out, count, some);
        }
}

#endif
