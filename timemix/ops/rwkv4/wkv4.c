/* The recurrence wkv4 token by token, forward and backward. Each channel has a state (a, b, p), which stands for the sums
   A = a exp(p) and B = b exp(p) over the tokens so far, with weights that decay by exp(w) at each token.

    y = (A + exp(u + k) v) / (B + exp(u + k))        A' = exp(w) A + exp(k) v        B' = exp(w) B + exp(k)

   p is the largest exponent of the sums, so each exponential below is of a number of at most 0:

    q = max(p, u + k)     e = exp(p - q)       n = exp(u + k - q)     y = (e a + n v) / (e b + n)
    p' = max(p + w, k)    d = exp(p + w - p')  m = exp(k - p')        a' = d a + m v           b' = d b + m

   Backward, from the last token to the first, with da and db the gradients of the loss for a and b at a constant p, which
   is exact, because the loss depends on A and B only. With g = dy / (e b + n):

    dk = m (v da' + db') + du        dv = m da' + n g        du = n g (v - y)        dw = d (a da' + b db')
    da = d da' + e g                 db = d db' - e g y      dp = a da + b db for the first state

   All factors are at most 1, so nothing overflows. Rounding errors that are equal at every token would add up, so d is the
   sum of two factors (exp_factor), 1 and d - 1 for a d near 1. The exponent of d is (p - p') + w: if p' is p + w, rounded,
   then d repairs the rounding error. This file is compiled without -fassociative-math, which would undo both. A token
   takes four exponentials per channel forward.

   The forward pass stores the state at the start of every chunk. The backward pass computes the states within a chunk
   again, so memory grows with T / CHUNK. Each task is a block of channels of one sequence, so results are bit-identical
   for any number of threads.

   All numbers are float32. k, v, y and their gradients are (B, T, C), states are (B, 3, C), w and u are (C,). */

#include "ops/rwkv4/wkv4.h"

typedef struct {
    int64_t B, T, C;
    const float *w, *u, *k, *v;
    /* (B,), and (B, T) or NULL */
    const int64_t *lengths;
    const uint8_t *resets;
} wkv4_inputs;

/* Gradients: k and v (B, T, C), w and u (B, C). */
typedef struct {
    float *k, *v, *w, *u;
} wkv4_gradients;

/* The channels `first` to `first` + count - 1 of the sequence `row`. */
typedef struct {
    int64_t row, first, count;
} wkv4_task;

static void wkv4_forward(const wkv4_inputs *x, wkv4_task task, float *state, float *y, float *starts) {
    const int64_t C = x->C, count = task.count, length = x->lengths[task.row], chunks = (x->T + CHUNK - 1) / CHUNK;
    wkv4_state s;
    wkv4_load(&s, state + task.row * 3 * C + task.first, C, count);
    for (int64_t t = 0; t < length; t++) {
        const int64_t token = task.row * x->T + t, at = token * C + task.first;
        if (starts && t % CHUNK == 0)
            wkv4_store(&s, starts + (task.row * chunks + t / CHUNK) * 3 * C + task.first, C, count);
        if (x->resets && x->resets[token]) wkv4_forget(&s);
        wkv4_read(&s, x->u + task.first, x->k + at, x->v + at, y + at, count);
        wkv4_state next;
        wkv4_update(&s, &next, x->w + task.first, x->k + at, x->v + at, count);
        s = next;
    }
    for (int64_t t = length; t < x->T; t++)
        memset(y + (task.row * x->T + t) * C + task.first, 0, count * sizeof(float));
    wkv4_store(&s, state + task.row * 3 * C + task.first, C, count);
}

/* The gradients of one token, from the state s before the token. d holds da' and db', then da and db. Adds to dw, du. */
INLINE void wkv4_token_back(const wkv4_state *restrict s, const wkv4_inputs *x, wkv4_task task, int64_t at,
                            const float *restrict dy, const wkv4_gradients *g, wkv4_state *restrict d,
                            float *restrict dw, float *restrict du) {
    const float *restrict w = x->w + task.first, *restrict u = x->u + task.first;
    const float *restrict k = x->k + at, *restrict v = x->v + at;
    float *restrict dk = g->k + at, *restrict dv = g->v + at;
    for (int64_t c = 0; c < task.count; c++) {
        float e, n;
        wkv4_factors(s->p[c], u[c], k[c], &e, &n);
        const float inverse = 1 / (e * s->b[c] + n), y = (e * s->a[c] + n * v[c]) * inverse, slope = dy[c] * inverse;
        const float p = larger(s->p[c] + w[c], k[c]);
        const float m = exp_series(k[c] - p);
        float stay, fall;
        exp_factor(difference(s->p[c], p, w[c]), &stay, &fall);
        const float bonus = n * slope * (v[c] - y);
        dk[c] = m * (v[c] * d->a[c] + d->b[c]) + bonus;
        dv[c] = m * d->a[c] + n * slope;
        du[c] += bonus;
        dw[c] += (stay + fall) * (s->a[c] * d->a[c] + s->b[c] * d->b[c]);
        d->a[c] = stay * d->a[c] + (fall * d->a[c] + e * slope);
        d->b[c] = stay * d->b[c] + (fall * d->b[c] - e * slope * y);
    }
}

static void wkv4_backward(const wkv4_inputs *x, wkv4_task task, const float *starts, const float *dy, float *dstate,
                          const wkv4_gradients *g) {
    const int64_t C = x->C, count = task.count, length = x->lengths[task.row], chunks = (x->T + CHUNK - 1) / CHUNK;
    wkv4_state states[CHUNK], d;
    float *dw = g->w + task.row * C + task.first, *du = g->u + task.row * C + task.first;
    memset(dw, 0, count * sizeof(float));
    memset(du, 0, count * sizeof(float));
    for (int64_t t = length; t < x->T; t++) {
        const int64_t at = (task.row * x->T + t) * C + task.first;
        memset(g->k + at, 0, count * sizeof(float));
        memset(g->v + at, 0, count * sizeof(float));
    }
    /* Without tokens, the last state is the first one, and `starts` holds nothing. */
    if (length == 0) return;
    wkv4_load(&d, dstate + task.row * 3 * C + task.first, C, count);
    for (int64_t chunk = (length - 1) / CHUNK; chunk >= 0; chunk--) {
        const int64_t first = chunk * CHUNK, tokens = length - first < CHUNK ? length - first : CHUNK;
        /* Sums over a chunk first, then over chunks: a plain sum over many tokens would lose more digits. */
        float chunk_dw[BLOCK] = {0}, chunk_du[BLOCK] = {0};
        wkv4_load(&states[0], starts + (task.row * chunks + chunk) * 3 * C + task.first, C, count);
        for (int64_t i = 0; i < tokens; i++) {
            const int64_t token = task.row * x->T + first + i, at = token * C + task.first;
            if (x->resets && x->resets[token]) wkv4_forget(&states[i]);
            if (i + 1 < tokens)
                wkv4_update(&states[i], &states[i + 1], x->w + task.first, x->k + at, x->v + at, count);
        }
        for (int64_t i = tokens - 1; i >= 0; i--) {
            const int64_t token = task.row * x->T + first + i, at = token * C + task.first;
            wkv4_token_back(&states[i], x, task, at, dy + at, g, &d, chunk_dw, chunk_du);
            if (x->resets && x->resets[token])
                for (int64_t c = 0; c < count; c++) d.a[c] = d.b[c] = 0;
        }
        for (int64_t c = 0; c < count; c++) {
            dw[c] += chunk_dw[c];
            du[c] += chunk_du[c];
        }
    }
    const float *start = starts + task.row * chunks * 3 * C + task.first;
    for (int64_t c = 0; c < count; c++) d.p[c] = start[c] * d.a[c] + start[C + c] * d.b[c];
    wkv4_store(&d, dstate + task.row * 3 * C + task.first, C, count);
}

INLINE wkv4_task wkv4_task_of(const wkv4_inputs *x, int64_t i) {
    const int64_t blocks = (x->C + BLOCK - 1) / BLOCK, first = i % blocks * BLOCK;
    return (wkv4_task){i / blocks, first, x->C - first < BLOCK ? x->C - first : BLOCK};
}

#define TASKS(x) ((x)->B * (((x)->C + BLOCK - 1) / BLOCK))

/* Computes y. state holds the state before the first token on entry, and the state after the last token on return.
   starts (B, chunks, 3, C) is NULL if no gradients are needed. */
void timemix_wkv4(int64_t threads, const wkv4_inputs *x, float *state, float *y, float *starts) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < TASKS(x); i++) wkv4_forward(x, wkv4_task_of(x, i), state, y, starts);
}

/* Computes the gradients of the inputs. dstate holds the gradients of the last a and b on entry, and the gradients of the
   first a, b and p on return. */
void timemix_wkv4_back(int64_t threads, const wkv4_inputs *x, const float *starts, const float *dy, float *dstate,
                       const wkv4_gradients *gradients) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < TASKS(x); i++) wkv4_backward(x, wkv4_task_of(x, i), starts, dy, dstate, gradients);
}
