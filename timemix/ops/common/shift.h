/* LayerNorm and token-shift along a piece of consecutive tokens, for the decode steps. The kernel for training is in
   norm_shift.c. */

#ifndef TIMEMIX_SHIFT_H
#define TIMEMIX_SHIFT_H

#include "ops/common/norm.h"

/* Token-shift of a layer. */
typedef struct {
    const int32_t *distance; /* (C,): number of tokens from which each channel comes */
    int64_t farthest;        /* the largest distance */
} token_shift;

/* in (count, C) = shift(norm(x)) along a piece: in[i, c] = norm(x)[i - distance[c], c].

   past (farthest, C) is the newest normalized rows before the piece, oldest first; the newest rows of the piece replace
   them. line (farthest + count, C) is scratch: past, then the rows of the piece. */
LOCAL void norm_shift(const float *x, const float *const norm[2], float epsilon, const token_shift *s, int64_t count,
                      int64_t C, float *past, float *line, float *in) {
    const int64_t farthest = s->farthest;
    memcpy(line, past, farthest * C * sizeof(float));
    for (int64_t i = 0; i < count; i++) normalize(x + i * C, norm, epsilon, C, line + (farthest + i) * C);
    memcpy(past, line + count * C, farthest * C * sizeof(float));
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < C; c++) in[i * C + c] = line[(farthest + i - s->distance[c]) * C + c];
}

#endif
