/* One token of every row through the whole model: the compiled step of models/step.py, which lays out what it reads.

   Products are of a matrix and a few vectors, so that a step takes the time in which the weights can be read. Weights are
   float32, bfloat16, or int8 with a scale for each output; all else is float32. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 16
#else
#define WIDTH 8
#endif
/* Bytes between what is read and what is asked of memory meanwhile. */
#ifndef AHEAD
#define AHEAD 8192
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
typedef int8_t bytes __attribute__((vector_size(WIDTH)));
typedef int32_t integers __attribute__((vector_size(4 * WIDTH)));

/* What is shared out by number: whatever the threads, since the last numbers of a part have another exp than whole vectors. */
#define PARTS 8

enum type { FLOAT32, BFLOAT16, INT8 };
#define BYTES(type) ((type) == FLOAT32 ? 4 : (type) == BFLOAT16 ? 2 : 1)
enum activation { GELU, MISH, RELU2, SILU };

/* Outputs come in panels; a panel holds, for each input, the weights of PANEL outputs side by side: one stream to read,
   and no sum across a vector. Zeros fill the last panel. */
#define PANEL (2 * WIDTH)

typedef struct {
    const void *weight; /* (panels, inputs, PANEL) */
    const float *scale; /* (panels * PANEL,), int8 alone */
    const float *bias;  /* (panels * PANEL,) or NULL */
    int64_t outputs, inputs;
} linear;

/* f_h(lag) of rwkv1 is a table, that of rwkv1_exp a sum of K modes: next = own * state + other * state of the partner. */
typedef struct {
    const float *mixer_norm[2], *ffn_norm[2];
    const int32_t *distance; /* (C,): tokens back that a channel is taken from */
    int64_t farthest;
    linear key, value, receptance, output, ffn_key, ffn_value, ffn_receptance, ffn_output;
    const float *f;                                /* (H, positions) */
    const float *alpha, *beta, *gamma;             /* (H, positions), (positions,), or NULL */
    const float *own, *other, *begin, *coefficients; /* (H, K) */
    const float *taps, *fade;                      /* (H, M), (H,) */
    float *numerators, *denominators, *mixer_shift, *ffn_shift, *newest;
    const float *pending; /* like numerators: what is summed up already of each position's past, or NULL */
} layer;

typedef struct {
    int64_t type, activation, vocabulary, layers, heads, channels, hidden;
    int64_t positions; /* entries of alpha, beta and gamma; the last serves all later positions */
    int64_t limit;     /* positions at which a row can stand, 0 for no end */
    int64_t history, modes, newest, threads;
    float epsilon;
    const float *embedding, *norm[2];
    linear head;
    layer *layer;
} model;

static inline __attribute__((always_inline)) vec load(const void *weights, int64_t at, enum type type) {
    if (type == FLOAT32) {
        vec x;
        memcpy(&x, (const float *)weights + at, sizeof x);
        return x;
    }
    /* By name where we can: compilers widen in steps of twice the width. */
    if (type == BFLOAT16) {
        halves x;
        memcpy(&x, (const uint16_t *)weights + at, sizeof x);
#if defined(__AVX512F__)
        return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#elif defined(__AVX2__)
        return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16);
#else
        return (vec)(__builtin_convertvector(x, words) << 16);
#endif
    }
    bytes x;
    memcpy(&x, (const int8_t *)weights + at, sizeof x);
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)x)));
#else
    return __builtin_convertvector(__builtin_convertvector(x, integers), vec);
#endif
}

/* y[r * outputs] (PANEL,) = dot products of a panel with `rows` vectors x[r * inputs]; `count` outputs of it are told. */
static inline __attribute__((always_inline)) void panel(const linear *l, int64_t first, enum type type, const float *x,
                                                        float *y, int64_t count, const int rows, const int unroll) {
    const int64_t inputs = l->inputs, at = first * inputs;
    const char *ahead = (const char *)l->weight + at * BYTES(type) + AHEAD;
    vec sum[2][6][2] = {{{{0}}}};
    int64_t i = 0;
    for (; i + unroll <= inputs; i += unroll)
        for (int k = 0; k < unroll; k++) {
            __builtin_prefetch(ahead + (i + k) * PANEL * BYTES(type));
            if (PANEL * BYTES(type) > 64) __builtin_prefetch(ahead + (i + k) * PANEL * BYTES(type) + 64);
            const vec a = load(l->weight, at + (i + k) * PANEL, type), b = load(l->weight, at + (i + k) * PANEL + WIDTH, type);
            for (int r = 0; r < rows; r++) {
                sum[k][r][0] += a * x[r * inputs + i + k];
                sum[k][r][1] += b * x[r * inputs + i + k];
            }
        }
    for (; i < inputs; i++)
        for (int r = 0; r < rows; r++) {
            sum[0][r][0] += load(l->weight, at + i * PANEL, type) * x[r * inputs + i];
            sum[0][r][1] += load(l->weight, at + i * PANEL + WIDTH, type) * x[r * inputs + i];
        }
    for (int r = 0; r < rows; r++) {
        float all[PANEL];
        for (int half = 0; half < 2; half++) {
            vec one = sum[0][r][half];
            if (unroll == 2) one += sum[1][r][half];
            memcpy(all + half * WIDTH, &one, sizeof one);
        }
        for (int o = 0; o < PANEL; o++) all[o] = all[o] * (l->scale ? l->scale[first + o] : 1) + (l->bias ? l->bias[first + o] : 0);
        if (count == PANEL) memcpy(y + r * l->outputs + first, all, sizeof all);
        else memcpy(y + r * l->outputs + first, all, count * sizeof(float));
    }
}

static inline __attribute__((always_inline)) void panel_of(const linear *l, int64_t first, enum type type, const float *x,
                                                           float *y, int64_t count, int64_t rows) {
    for (; rows >= 6; rows -= 6, x += 6 * l->inputs, y += 6 * l->outputs) panel(l, first, type, x, y, count, 6, 1);
    switch (rows) {
    case 1: panel(l, first, type, x, y, count, 1, 2); break;
    case 2: panel(l, first, type, x, y, count, 2, 2); break;
    case 3: panel(l, first, type, x, y, count, 3, 1); break;
    case 4: panel(l, first, type, x, y, count, 4, 1); break;
    case 5: panel(l, first, type, x, y, count, 5, 1); break;
    }
}

/* y (rows, outputs) = x (rows, inputs) weight^T + bias, shared out over the threads; the caller puts the barrier. */
static void apply(const linear *l, int64_t type, const float *x, float *y, int64_t rows) {
    const int64_t panels = (l->outputs + PANEL - 1) / PANEL;
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < panels; n++) {
        const int64_t first = n * PANEL, left = l->outputs - first, count = left < PANEL ? left : PANEL;
        if (type == FLOAT32) panel_of(l, first, FLOAT32, x, y, count, rows);
        else if (type == BFLOAT16) panel_of(l, first, BFLOAT16, x, y, count, rows);
        else panel_of(l, first, INT8, x, y, count, rows);
    }
}

int64_t timemix_panel(void) { return PANEL; }

static void normalize(const float *x, const float *const norm[2], float epsilon, int64_t channels, float *y) {
    float mean = 0, variance = 0;
    for (int64_t c = 0; c < channels; c++) mean += x[c];
    mean /= channels;
    for (int64_t c = 0; c < channels; c++) variance += (x[c] - mean) * (x[c] - mean);
    const float scale = 1 / sqrtf(variance / channels + epsilon);
    for (int64_t c = 0; c < channels; c++) y[c] = (x[c] - mean) * scale * norm[0][c] + norm[1][c];
}

/* Token-shift of y (C,) in place; past (farthest, C) holds the newest rows, oldest first, and takes y as the newest. */
static void shift(float *y, float *past, const int32_t *distance, int64_t farthest, int64_t channels) {
    if (farthest == 0) return;
    for (int64_t c = 0; c < channels; c++) {
        const float own = y[c];
        if (distance[c]) y[c] = past[(farthest - distance[c]) * channels + c];
        for (int64_t d = 0; d + 1 < farthest; d++) past[d * channels + c] = past[(d + 1) * channels + c];
        past[(farthest - 1) * channels + c] = own;
    }
}

static inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

static inline float mish(float x) {
    const float e = expf(fminf(x, 20)), n = e * (e + 2);
    return x * n / (n + 2);
}

static void gate(const float *key, const float *value, int64_t n, int64_t activation, float *y) {
    switch (activation) {
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

static void add_gated(const float *gate, const float *y, int64_t n, float *x) {
    for (int64_t i = 0; i < n; i++) x[i] += sigmoid(gate[i]) * y[i];
}

/* sum[n] += sum_u weights[-u] history[u * size + n], for `width` channels. */
static inline __attribute__((always_inline)) void look_back(const float *weights, const float *history, int64_t length,
                                                            int64_t size, const int width, float *sum) {
    float held[64];
    for (int n = 0; n < width; n++) held[n] = 0;
    for (int64_t u = 0; u < length; u++)
        for (int n = 0; n < width; n++) held[n] += weights[-u] * history[u * size + n];
    for (int n = 0; n < width; n++) sum[n] += held[n];
}

static void look_back_all(const float *weights, const float *history, int64_t length, int64_t size, float *sum) {
    int64_t n = 0;
    for (; n + 64 <= size; n += 64) look_back(weights, history + n, length, size, 64, sum + n);
    for (; n + 32 <= size; n += 32) look_back(weights, history + n, length, size, 32, sum + n);
    for (; n + 8 <= size; n += 8) look_back(weights, history + n, length, size, 8, sum + n);
    for (; n < size; n++) look_back(weights, history + n, length, size, 1, sum + n);
}

static inline int64_t entry(const model *m, int64_t position) {
    return position < m->positions ? position : m->positions - 1;
}

/* y (N,) = wkv of one head of one row; exp(k) and v (N,) are those of the token at `position`. What is older than `start` is
   pending already. */
static void time_mix(const model *m, const layer *l, int64_t row, int64_t h, int64_t position, int64_t start,
                     const float *key, const float *value, float *y) {
    const int64_t N = m->channels / m->heads, K = m->modes, M = m->newest;
    const int64_t at = h * m->positions + entry(m, position);
    const float alpha = l->alpha ? l->alpha[at] : 1, beta = l->beta ? l->beta[at] : 1;
    const float fade = l->fade && position >= m->positions - 1 ? l->fade[h] : 1;
    float *total = l->denominators + (row * m->heads + h) * N;
    float exp_k[N], source[N];
    for (int64_t n = 0; n < N; n++) {
        exp_k[n] = expf(fminf(fmaxf(key[n], -60), 30));
        source[n] = alpha * exp_k[n] * value[n];
        y[n] = 0;
        total[n] = fade * total[n] + exp_k[n];
    }
    if (l->f) {
        float *history = l->numerators + (row * m->heads + h) * m->history * N;
        memcpy(history + position * N, source, N * sizeof(float));
        if (l->pending) memcpy(y, l->pending + (history - l->numerators) + position * N, N * sizeof(float));
        look_back_all(l->f + h * m->history + position - start, history + start * N, position + 1 - start, N, y);
    }
    for (int64_t j = 0; j < K; j += 2) {
        float *a = l->numerators + ((row * m->heads + h) * K + j) * N, *b = j + 1 < K ? a + N : a;
        const int64_t s = h * K + j, t = j + 1 < K ? s + 1 : s;
        for (int64_t n = 0; n < N; n++) {
            const float p = fade * (l->own[s] * a[n] + l->other[s] * b[n]) + l->begin[s] * source[n];
            const float q = fade * (l->own[t] * b[n] + l->other[t] * a[n]) + l->begin[t] * source[n];
            y[n] += l->coefficients[s] * p + (t == s ? 0 : l->coefficients[t] * q);
            b[n] = q;
            a[n] = p;
        }
    }
    float *newest = l->newest + (row * m->heads + h) * M * N;
    for (int64_t lag = M; lag-- > 0;)
        for (int64_t n = 0; n < N; n++) {
            float *x = newest + (M - 1 - lag) * N + n;
            *x = lag == 0 ? source[n] : fade * x[N];
            y[n] += l->taps[h * M + lag] * *x;
        }
    for (int64_t n = 0; n < N; n++) y[n] = beta * y[n] / total[n];
}

enum fault { NONE, UNKNOWN_TOKEN, PAST_THE_END, NO_SUCH_ROW };

/* Feeds tokens[i] to row place[i] of the state's `places`, none twice, which stands at position[place[i]], and has all that is older than start[i]
   pending (start NULL: nothing is); logits (rows, V). `scratch` holds
   rows * (2 C + max(3 C, 2 F + C) + max(C, F)) numbers. Returns a fault, before anything is written. */
int timemix_step(const model *m, int64_t rows, int64_t places, const int64_t *place, int64_t *position, const int64_t *start,
                 const int64_t *tokens, float *logits, float *scratch) {
    for (int64_t i = 0; i < rows; i++) {
        if (place[i] < 0 || place[i] >= places || position[place[i]] < 0) return NO_SUCH_ROW;
        if (tokens[i] < 0 || tokens[i] >= m->vocabulary) return UNKNOWN_TOKEN;
        if (m->limit && position[place[i]] >= m->limit) return PAST_THE_END;
    }
    const int64_t C = m->channels, F = m->hidden, H = m->heads, N = C / H, t = m->type;
    const int64_t inner = 3 * C > 2 * F + C ? 3 * C : 2 * F + C;
    float *x = scratch, *in = x + rows * C, *k = in + rows * C, *mixed = k + rows * inner;
#pragma omp parallel num_threads(m->threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) memcpy(x + i * C, m->embedding + tokens[i] * C, C * sizeof(float));
        for (int64_t n = 0; n < m->layers; n++) {
            const layer *l = m->layer + n;
            float *v = k + rows * C, *r = v + rows * C;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < rows; i++) {
                normalize(x + i * C, l->mixer_norm, m->epsilon, C, in + i * C);
                shift(in + i * C, l->mixer_shift + place[i] * l->farthest * C, l->distance, l->farthest, C);
            }
            apply(&l->key, t, in, k, rows);
            apply(&l->value, t, in, v, rows);
            apply(&l->receptance, t, in, r, rows);
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t task = 0; task < rows * H; task++) {
                const int64_t i = task / H, h = task % H, at = i * C + h * N;
                time_mix(m, l, place[i], h, position[place[i]], start ? start[i] : 0, k + at, v + at, mixed + at);
                for (int64_t c = at; c < at + N; c++) mixed[c] *= sigmoid(r[c]);
            }
            apply(&l->output, t, mixed, in, rows);
#pragma omp barrier
            float *fv = k + rows * F, *fr = fv + rows * F;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < rows; i++) {
                const float gamma = l->gamma ? l->gamma[entry(m, position[place[i]])] : 1;
                for (int64_t c = i * C; c < (i + 1) * C; c++) x[c] += gamma * in[c];
                normalize(x + i * C, l->ffn_norm, m->epsilon, C, in + i * C);
                shift(in + i * C, l->ffn_shift + place[i] * l->farthest * C, l->distance, l->farthest, C);
            }
            apply(&l->ffn_key, t, in, k, rows);
            apply(&l->ffn_value, t, in, fv, rows);
            apply(&l->ffn_receptance, t, in, fr, rows);
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t part = 0; part < PARTS * rows; part++) {
                const int64_t from = F * part / PARTS, to = F * (part + 1) / PARTS;
                gate(k + from, fv + from, to - from, m->activation, mixed + from);
            }
            apply(&l->ffn_output, t, mixed, in, rows);
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t part = 0; part < PARTS * rows; part++) {
                const int64_t from = C * part / PARTS, to = C * (part + 1) / PARTS;
                add_gated(fr + from, in + from, to - from, x + from);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) normalize(x + i * C, m->norm, m->epsilon, C, in + i * C);
        apply(&m->head, t, in, logits, rows);
    }
    for (int64_t i = 0; i < rows; i++) position[place[i]]++;
    return NONE;
}
