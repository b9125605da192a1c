/* Linear maps of a few rows, at the speed of reading the weights from memory.

    y[r, o] = scale[o] sum_i x[r, i] weight[o, i] + bias[o]                              float32, bfloat16 and int8
    y[r, o] = sum_g scale[o, g] sum_{i in g} x[r, i] LEVELS[code[o, i]] + bias[o]        int4, groups g of 32 inputs

   x, y, bias and the scale of int8 are float32. The scale of int4 is bfloat16. Float32 and bfloat16 weights have no
   scale. For bfloat16 weights, a processor with an instruction for bfloat16 rounds x to bfloat16 (ROUNDS).

   Layout: weight (outputs, inputs) -> (panels, inputs, PANEL). A panel has, for each input, the weights of PANEL
   outputs side by side. So a product reads contiguous memory, and needs no sum over the elements of a vector. The last
   panel is padded with zeros. In int4, a word has the codes of 8 inputs of one output, the first input in the lowest
   bits: (panels, 4 groups, PANEL) words, and (panels, groups, PANEL) scales. So a vector of words, shifted by 4 bits
   for each input, holds the codes of a vector of outputs in its lowest bits.

   Each output is one chain of multiply-adds over the inputs in ascending order, for any number of rows and threads. In
   int4, each group is a chain, and the sums of the groups are another chain. So the outputs of a row are bit-identical
   for any other rows of the batch. */

#ifndef TIMEMIX_PANELS_H
#define TIMEMIX_PANELS_H

#include <stdlib.h>

#include "ops/common/types.h"
#include "ops/common/vectors.h"

/* Number of vectors of outputs in a panel. The sums of the vectors are independent, which hides the latency of
   multiply-add even for one row. */
#define VECTORS 4
#define PANEL (VECTORS * WIDTH)

/* ROWS is the number of rows in a block. The ROWS * VECTORS sums of a panel fit into the vector registers. There are 32
   vector registers with AVX-512 and 16 otherwise. AT_ONCE is the number of vectors of int4 words in registers. */
#if defined(__AVX512F__)
#define ROWS 6
#define AT_ONCE VECTORS
#else
#define ROWS 3
#define AT_ONCE 1
#endif

/* Distance in bytes from the weights in use to the weights that are prefetched. */
#ifndef AHEAD
#define AHEAD 8192
#endif

/* Inputs of a group of int4, and inputs of a word. */
#define GROUP 32
#define WORD 8

typedef struct {
    const void *weight; /* (panels, inputs, PANEL); int4: words (panels, 4 groups, PANEL) */
    const void *scale;  /* int8: (panels * PANEL,); int4: (panels, groups, PANEL); otherwise NULL for 1 */
    const float *bias;  /* (panels * PANEL,), or NULL for 0 */
    int64_t type, outputs, inputs;
} linear;

/* y[r, first + o] = scale sum_i x[r, i] weight[first + o, i] + bias, for r < rows and o < count <= PANEL.

   x is (rows, inputs), y is (rows, outputs), and `first` is a multiple of PANEL. `rows` is a constant of at most ROWS,
   so that all sums stay in registers. Each weight is loaded once for all rows. */
INLINE void multiply_panel(const linear *l, int64_t first, enum type type, const float *x, float *y, int64_t count,
                           const int rows) {
    const int64_t inputs = l->inputs, at = first * inputs;
    const float *scale = l->scale;
    const char *ahead = (const char *)l->weight + at * BYTES(type) + AHEAD;
    vec sum[ROWS][VECTORS] = {{{0}}};
    for (int64_t i = 0; i < inputs; i++) {
        for (int line = 0; line < PANEL * BYTES(type); line += 64)
            __builtin_prefetch(ahead + i * PANEL * BYTES(type) + line);
        vec weight[VECTORS];
        for (int n = 0; n < VECTORS; n++)
            weight[n] = load_vector(l->weight, at + i * PANEL + n * WIDTH, type);
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < VECTORS; n++) sum[r][n] += weight[n] * x[r * inputs + i];
    }
    for (int r = 0; r < rows; r++) {
        float all[PANEL];
        memcpy(all, sum[r], sizeof all);
        for (int o = 0; o < PANEL; o++)
            all[o] = all[o] * (scale ? scale[first + o] : 1) + (l->bias ? l->bias[first + o] : 0);
        if (count == PANEL) memcpy(y + r * l->outputs + first, all, sizeof all);
        else memcpy(y + r * l->outputs + first, all, count * sizeof(float));
    }
}

/* sum[r, n] += x[r, i] LEVELS[code[i]] for the `count` inputs i of a word. x is (rows, inputs). */
INLINE void add_word(const uint32_t *word, const float *x, int64_t inputs, const int count, const int rows,
                     vec sum[ROWS][VECTORS]) {
    for (int first = 0; first < VECTORS; first += AT_ONCE) {
        unpacked levels[AT_ONCE];
        for (int n = 0; n < AT_ONCE; n++) {
            words codes;
            memcpy(&codes, word + (first + n) * WIDTH, sizeof codes);
            levels[n] = unpack_codes(codes);
        }
        for (int i = 0; i < count; i++)
            for (int n = 0; n < AT_ONCE; n++) {
                const vec weight = level_of(levels[n], i);
                for (int r = 0; r < rows; r++)
                    sum[r][first + n] = multiply_add(weight, x[r * inputs + i], sum[r][first + n]);
            }
    }
}

/* multiply_panel for int4 */
INLINE void multiply_groups(const linear *l, int64_t first, const float *x, float *y, int64_t count, const int rows) {
    const int64_t inputs = l->inputs, groups = (inputs + GROUP - 1) / GROUP;
    const uint32_t *word = (const uint32_t *)l->weight + first * groups * (GROUP / WORD);
    vec total[ROWS][VECTORS] = {{{0}}};
    for (int64_t g = 0; g < groups; g++) {
        vec sum[ROWS][VECTORS] = {{{0}}};
        for (int64_t i = g * GROUP; i < (g + 1) * GROUP && i < inputs; i += WORD, word += PANEL) {
            for (int line = 0; line < PANEL * 4; line += 64) __builtin_prefetch((const char *)word + AHEAD + line);
            if (i + WORD <= inputs) add_word(word, x + i, inputs, WORD, rows, sum);
            else add_word(word, x + i, inputs, inputs - i, rows, sum);
        }
        for (int n = 0; n < VECTORS; n++) {
            const vec scale = load_vector(l->scale, (first * groups + g * PANEL) + n * WIDTH, BFLOAT16);
            for (int r = 0; r < rows; r++) total[r][n] += scale * sum[r][n];
        }
    }
    for (int r = 0; r < rows; r++) {
        float all[PANEL];
        memcpy(all, total[r], sizeof all);
        for (int o = 0; l->bias && o < PANEL; o++) all[o] += l->bias[first + o];
        memcpy(y + r * l->outputs + first, all, count * sizeof(float));
    }
}

/* ROUNDS(type) is 1 if x is rounded to bfloat16 for weights of a type. The instruction multiplies two pairs of bfloat16
   numbers in each lane, and adds the products to a float32 sum:

    sum = (sum + upper half of a * upper half of b) + lower half of a * lower half of b

   It rounds after each addition, and rounds numbers below the smallest normal number to 0. The first input of a pair is in
   the upper half. So each sum is a chain in ascending order, for any division of the inputs into pairs. */
#if defined(__AVX512BF16__)
#define ROUNDS(type) ((type) == BFLOAT16)

/* pair[n] = x[2 n] and x[2 n + 1] in bfloat16. A number after the last is 0. The pairs may overwrite x (count,). */
LOCAL void round_row(const float *x, int64_t count, float *pair) {
    for (int64_t i = 0; i < count; i += 2 * WIDTH) {
        const uint32_t mask = count - i < 2 * WIDTH ? (1u << (count - i)) - 1 : ~0u;
        const __m512 low = _mm512_maskz_loadu_ps(mask, x + i), high = _mm512_maskz_loadu_ps(mask >> 16, x + i + WIDTH);
        const __m512i pairs = _mm512_rol_epi32((__m512i)_mm512_cvtne2ps_pbh(high, low), 16);
        const int64_t words = (count - i + 1) / 2;
        _mm512_mask_storeu_epi32(pair + i / 2, words < WIDTH ? (1u << words) - 1 : 0xffff, pairs);
    }
}

/* sum[r] += the products of a pair of inputs with PANEL outputs. The lines of the two inputs are `first` and `second`, which
   is NULL after the last input. pair is the pair of the first row. The lines are interleaved within 128 bits, so the sums
   have the order of put_in_order(). */
INLINE void add_pair(const uint16_t *first, const uint16_t *second, const float *pair, int64_t stride, const int rows,
                     __m512 sum[ROWS][VECTORS]) {
    __m512bh weight[VECTORS];
    for (int n = 0; n < VECTORS; n += 2) {
        const __m512i upper = _mm512_loadu_si512(first + n * WIDTH);
        const __m512i lower = second ? _mm512_loadu_si512(second + n * WIDTH) : _mm512_setzero_si512();
        weight[n] = (__m512bh)_mm512_unpacklo_epi16(lower, upper);
        weight[n + 1] = (__m512bh)_mm512_unpackhi_epi16(lower, upper);
    }
    for (int r = 0; r < rows; r++) {
        const __m512bh x = (__m512bh)_mm512_set1_ps(pair[r * stride]);
        for (int n = 0; n < VECTORS; n++) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], weight[n], x);
    }
}

/* Stores the sums of a row in the order of the outputs. Of 32 outputs, the first vector has the sums of 0 to 3, 8 to 11,
   16 to 19 and 24 to 27. */
INLINE void put_in_order(float *y, const __m512 sum[VECTORS]) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_or_si512(low, _mm512_set1_epi32(8));
    for (int n = 0; n < VECTORS; n += 2) {
        _mm512_storeu_ps(y + n * WIDTH, _mm512_permutex2var_ps(sum[n], low, sum[n + 1]));
        _mm512_storeu_ps(y + (n + 1) * WIDTH, _mm512_permutex2var_ps(sum[n], high, sum[n + 1]));
    }
}

/* multiply_panel for bfloat16, with the instruction. The rows of x have `length` numbers in pairs (round_row), and begin at
   multiples of l->inputs. `index` has the inputs of the numbers, and more inputs to prefetch. NULL: all inputs. */
INLINE void multiply_pairs(const linear *l, int64_t first, const float *x, const int32_t *index, int64_t length, float *y,
                           int64_t count, const int rows) {
    const int64_t inputs = l->inputs;
    const uint16_t *panel = (const uint16_t *)l->weight + first * inputs;
    __m512 sum[ROWS][VECTORS] = {{{0}}};
    for (int64_t i = 0; i < length; i += 2) {
        /* The processor predicts the addresses of all inputs. */
        for (int64_t n = i + AHEAD / (2 * PANEL); index && n < i + AHEAD / (2 * PANEL) + 2; n++)
            prefetch(BFLOAT16, panel, index[n] * PANEL, PANEL);
        const uint16_t *line = panel + (index ? index[i] : i) * PANEL;
        const uint16_t *next = i + 1 < length ? panel + (index ? index[i + 1] : i + 1) * PANEL : NULL;
        add_pair(line, next, x + i / 2, inputs, rows, sum);
    }
    for (int r = 0; r < rows; r++) {
        float all[PANEL];
        put_in_order(all, sum[r]);
        for (int o = 0; l->bias && o < PANEL; o++) all[o] += l->bias[first + o];
        memcpy(y + r * l->outputs + first, all, count * sizeof(float));
    }
}
#else
#define ROUNDS(type) 0
#define round_row(x, count, pair) (void)0
#define multiply_pairs(l, first, x, index, length, y, count, rows) (void)0
#endif

INLINE void multiply_rows(const linear *l, int64_t first, enum type type, const float *x, float *y, int64_t count,
                          const int rows) {
    if (type == INT4) multiply_groups(l, first, x, y, count, rows);
    else if (ROUNDS(type)) multiply_pairs(l, first, x, NULL, l->inputs, y, count, rows);
    else multiply_panel(l, first, type, x, y, count, rows);
}

/* multiply_rows for a variable number of rows, 1 to ROWS. */
INLINE void multiply_block(const linear *l, int64_t first, enum type type, const float *x, float *y, int64_t count,
                           int64_t rows) {
    switch (rows) {
    case 1: multiply_rows(l, first, type, x, y, count, 1); break;
    case 2: multiply_rows(l, first, type, x, y, count, 2); break;
#if ROWS > 3
    case 3: multiply_rows(l, first, type, x, y, count, 3); break;
    case 4: multiply_rows(l, first, type, x, y, count, 4); break;
    case 5: multiply_rows(l, first, type, x, y, count, 5); break;
#endif
    default: multiply_rows(l, first, type, x, y, count, ROWS);
    }
}

/* Memory for `count` numbers that belongs to the calling thread until its next call. */
LOCAL float *thread_memory(int64_t count) {
    static __thread float *memory;
    static __thread int64_t size;
    if (count > size) {
        free(memory);
        memory = malloc(count * sizeof(float));
        size = count;
        if (!memory) abort();
    }
    return memory;
}

/* y (rows, outputs) = x (rows, inputs) weight^T + bias.

   The caller calls this function inside a parallel region. The threads share the pairs of a panel and a block of rows. Each
   thread rounds the rows for itself, which takes less time than to wait for others. There is no barrier at the end, so that
   several linear maps can follow one another. The caller adds the barrier. */
LOCAL void multiply(const linear *l, const float *x, float *y, int64_t rows) {
    const int64_t panels = (l->outputs + PANEL - 1) / PANEL, blocks = (rows + ROWS - 1) / ROWS, inputs = l->inputs;
    float *pairs = ROUNDS(l->type) ? thread_memory(rows * inputs) : NULL;
    int64_t rounded = 0;
#pragma omp for collapse(2) schedule(static) nowait
    for (int64_t n = 0; n < panels; n++)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = n * PANEL, left = l->outputs - first, count = left < PANEL ? left : PANEL;
            const int64_t row = block * ROWS, some = rows - row < ROWS ? rows - row : ROWS;
            /* A thread has consecutive tasks, so its first `blocks` tasks have different blocks. */
            if (pairs && rounded++ < blocks)
                for (int64_t r = row; r < row + some; r++) round_row(x + r * inputs, inputs, pairs + r * inputs);
            const float *in = (pairs ? pairs : x) + row * inputs;
            float *out = y + row * l->outputs;
            if (l->type == FLOAT32) multiply_block(l, first, FLOAT32, in, out, count, some);
            else if (l->type == BFLOAT16) multiply_block(l, first, BFLOAT16, in, out, count, some);
            else if (l->type == INT8) multiply_block(l, first, INT8, in, out, count, some);
            else multiply_block(l, first, INT4, in, out, count, some);
        }
}

#endif
