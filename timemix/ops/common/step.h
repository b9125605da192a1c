/* What the compiled steps of all architectures share: the layers before the first block and after the last block.

    x = input_norm(embedding[token])    ...    logits = head(norm(x))

   A call processes pieces. A piece consists of consecutive tokens of one text: one new token, or a part of a prompt. A
   row is one token of a piece. The structures equal those of models/compiled_step.py, field by field. */

#ifndef TIMEMIX_STEP_H
#define TIMEMIX_STEP_H

#include "ops/common/norm.h"
#include "ops/common/panels.h"

/* Parts into which the elementwise work on a row is divided, for any number of threads. The numbers at the end of a
   part that do not fill a vector use another exp than full vectors, so the results depend on where parts end. */
#define PARTS 8

/* The first field of each architecture's model. */
typedef struct {
    int64_t vocabulary, layers, channels;
    int64_t limit; /* the number of positions, 0 if unlimited */
    int64_t threads, stored; /* stored: type of the embedding, FLOAT32 or BFLOAT16 */
    float epsilon;
    const void *embedding;                  /* (V, C) */
    const float *input_norm[2], *norm[2];   /* {weight, bias} (C,); input_norm {NULL, NULL} for none */
    linear head;
} common;

/* The pieces of a call.

   slot (pieces,), first (pieces + 1,): piece p has the rows first[p] to first[p + 1] - 1, and belongs to slot[p] of a
       state with `slots` slots. The slots of the pieces are all different.
   position (slots,): number of tokens of each slot so far. The call updates it.
   tokens (rows,): token ids.
   wanted (outputs,): rows whose logits are computed. */
typedef struct {
    int64_t pieces, slots, outputs;
    const int64_t *slot, *first;
    int64_t *position;
    const int64_t *tokens, *wanted;
} batch;

/* Results of timemix_step. compiled_step.py has the error message for each number. */
enum fault { NONE, UNKNOWN_TOKEN, PAST_THE_END, NO_SUCH_SLOT };

/* Outputs of a panel, for the layout of weights in compiled_step.py. */
int64_t timemix_panel(void) { return PANEL; }

/* Returns the fault of a call, before anything is written. */
static enum fault check(const common *m, const batch *b) {
    for (int64_t i = 0; i < b->pieces; i++) {
        const int64_t slot = b->slot[i];
        if (slot < 0 || slot >= b->slots || b->position[slot] < 0) return NO_SUCH_SLOT;
        if (m->limit && b->position[slot] + b->first[i + 1] - b->first[i] > m->limit) return PAST_THE_END;
    }
    for (int64_t i = 0; i < b->first[b->pieces]; i++)
        if (b->tokens[i] < 0 || b->tokens[i] >= m->vocabulary) return UNKNOWN_TOKEN;
    return NONE;
}

/* Returns the piece of a row. */
LOCAL int64_t piece_of(const batch *b, int64_t row) {
    int64_t low = 0, high = b->pieces;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (b->first[middle] <= row) low = middle;
        else high = middle;
    }
    return low;
}

/* x (rows, C) = input_norm(embedding[token]). As all functions below except advance(), it is called inside a parallel
   region by all threads, which share the rows. */
static void embed(const common *m, const batch *b, float *x) {
    const int64_t C = m->channels;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b->first[b->pieces]; i++) {
        float *row = x + i * C;
        for (int64_t c = 0; c < C; c++) row[c] = load(m->stored, m->embedding, b->tokens[i] * C + c);
        if (m->input_norm[0]) normalize(row, m->input_norm, m->epsilon, C, row);
    }
}

/* logits (outputs, V) = head(norm(x)) of the wanted rows. in (outputs, C) is scratch. */
static void predict(const common *m, const batch *b, const float *x, float *in, float *logits) {
    const int64_t C = m->channels;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b->outputs; i++) normalize(x + b->wanted[i] * C, m->norm, m->epsilon, C, in + i * C);
    multiply(&m->head, in, logits, b->outputs);
}

/* Adds the tokens of the pieces to the positions of their slots. */
static void advance(const batch *b) {
    for (int64_t p = 0; p < b->pieces; p++) b->position[b->slot[p]] += b->first[p + 1] - b->first[p];
}

#endif
