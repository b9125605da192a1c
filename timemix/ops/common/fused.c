/* What lies between the matrix products of a training step, forward and backward, one pass over memory each: the
   kernels of ops/fused.py, which says what they compute. B texts of T positions, each a row.

   What goes into a product or comes out of one is of a `type`, float32 or bfloat16; all else is float32. A sum over rows is
   made in PARTS parts (fused.py), added up by the caller: its bits do not depend on the number of threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Positions after which a running sum starts anew from 0, to be added to what came before: so it rounds less. */
#define SPAN 64
/* Inlined where type and activation are constants, so that the innermost loops are without choices. */
#define INLINE static inline __attribute__((always_inline))

enum type { FLOAT32, BFLOAT16 };
enum activation { GELU, MISH, RELU2, SILU };

typedef union {
    float value;
    uint32_t bits;
} number;

INLINE float get(enum type type, const void *x, int64_t i) {
    if (type == FLOAT32) return ((const float *)x)[i];
    return (number){.bits = (uint32_t)((const uint16_t *)x)[i] << 16}.value;
}

INLINE void put(enum type type, void *x, int64_t i, float value) {
    if (type == FLOAT32) {
        ((float *)x)[i] = value;
        return;
    }
    const uint32_t bits = (number){.value = value}.bits;
    ((uint16_t *)x)[i] = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE const void *from(enum type type, const void *x, int64_t i) {
    return (const char *)x + i * (type == FLOAT32 ? 4 : 2);
}

INLINE void *into(enum type type, void *x, int64_t i) { return (char *)x + i * (type == FLOAT32 ? 4 : 2); }

/* Asks for n numbers ahead of their use: memory that is walked through backwards is not foreseen by every processor. */
INLINE void expect(enum type type, const void *x, int64_t i, int64_t n) {
    const char *line = from(type, x, i), *end = from(type, x, i + n);
    for (; line < end; line += 64) __builtin_prefetch(line);
}

/* e^x = 2^n e^r, the latter by its series: within 3e-7 for x up to 88, where products and sums are fused, else 4e-6. The
   library's own stops a loop for a call. */
INLINE float exponential(float x) {
    x = x < -87 ? -87 : x;
    const float n = rintf(x * 1.44269504f), r = x - n * 0.69314718f;
    const number power = {.bits = (uint32_t)((int32_t)n + 127) << 23};
    const float high = 1.f / 24 + r * (1.f / 120 + r * (1.f / 720 + r / 5040));
    return (1 + r * (1 + r * (0.5f + r * (1.f / 6 + r * high)))) * power.value;
}

INLINE float sigmoid(float x) { return 1 / (1 + exponential(x < -60 ? 60 : -x)); }

INLINE float exp_key(float k) { return exponential(k < -60 ? -60 : k > 30 ? 30 : k); }

/* Token-shift: channels edge[g] to edge[g + 1] are taken from g + 1 positions back, those from edge[groups] on from none. */
typedef struct {
    int64_t groups;
    const int64_t *edge;
    int64_t B, T, C;
} shift;

INLINE void norm_shift(enum type type, const shift *s, int64_t row, const float *x, const float *weight,
                       const float *bias, float epsilon, void *y, float *mean, float *scale) {
    const int64_t C = s->C, t = row % s->T;
    float m = 0, variance = 0;
    for (int64_t c = 0; c < C; c++) m += x[row * C + c];
    m /= C;
    for (int64_t c = 0; c < C; c++) variance += (x[row * C + c] - m) * (x[row * C + c] - m);
    const float r = 1 / sqrtf(variance / C + epsilon);
    mean[row] = m;
    scale[row] = r;
    for (int64_t g = 0; g <= s->groups; g++) {
        const int64_t first = s->edge[g], end = g < s->groups ? s->edge[g + 1] : C, d = g < s->groups ? g + 1 : 0;
        if (t + d < s->T) {
            void *out = into(type, y, (row + d) * C);
#pragma omp simd
            for (int64_t c = first; c < end; c++)
                put(type, out, c, (x[row * C + c] - m) * r * weight[c] + bias[c]);
        }
        if (t < d) memset(into(type, y, row * C + first), 0, (end - first) * (type == FLOAT32 ? 4 : 2));
    }
}

/* y (B, T, C): LayerNorm of x, shifted; mean and scale (B, T) of each row are kept for the way back. */
void timemix_norm_shift(int64_t type, int64_t threads, const shift *s, const float *x, const float *weight, const float *bias,
                        float epsilon, void *y, float *mean, float *scale) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < s->B * s->T; row++) {
        if (type == FLOAT32) norm_shift(FLOAT32, s, row, x, weight, bias, epsilon, y, mean, scale);
        else norm_shift(BFLOAT16, s, row, x, weight, bias, epsilon, y, mean, scale);
    }
}

INLINE void norm_shift_back(enum type type, const shift *s, int64_t row, const float *x, const float *weight, float m,
                            float r, const void *dy, float *dx, float *dweight, float *dbias, float *g, float *unit) {
    const int64_t C = s->C;
    float sum = 0, product = 0;
    for (int64_t n = 0; n <= s->groups; n++) {
        const int64_t first = s->edge[n], end = n < s->groups ? s->edge[n + 1] : C, d = n < s->groups ? n + 1 : 0;
        if (row % s->T + d < s->T) {
            const void *gradient = from(type, dy, (row + d) * C);
#pragma omp simd
            for (int64_t c = first; c < end; c++) g[c] = get(type, gradient, c);
        } else memset(g + first, 0, (end - first) * sizeof(float));
    }
#pragma omp simd reduction(+ : sum, product)
    for (int64_t c = 0; c < C; c++) {
        unit[c] = (x[row * C + c] - m) * r;
        dweight[c] += g[c] * unit[c];
        dbias[c] += g[c];
        g[c] *= weight[c];
        sum += g[c];
        product += g[c] * unit[c];
    }
#pragma omp simd
    for (int64_t c = 0; c < C; c++) dx[row * C + c] = r * (g[c] - (sum + unit[c] * product) / C);
}

/* dx (B, T, C), and the parts of the gradients of weight and bias (PARTS, C). */
void timemix_norm_shift_back(int64_t type, int64_t threads, const shift *s, const float *x, const float *weight, const float *mean,
                             const float *scale, const void *dy, float *dx, float *dweight, float *dbias) {
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

/* Sizes of time-mix, and a table (H, positions), NULL for 1. */
typedef struct {
    int64_t B, T, H, N, positions;
    const float *table;
} sizes;

/* Some of the heads of a text: one thread's walk along time. Over all of a position's heads before the next position, so
   that memory is read in its order. */
typedef struct {
    int64_t b, first, end;
} walk;

/* Walks for each text: one where there are texts enough for the threads. */
static int64_t walks(const sizes *m, int64_t threads) {
    const int64_t wanted = m->B < threads ? threads / (m->B ? m->B : 1) : 1;
    return wanted < m->H ? wanted : m->H;
}

static walk walk_of(const sizes *m, int64_t walks, int64_t task) {
    const int64_t part = task % walks;
    return (walk){task / walks, m->H * part / walks, m->H * (part + 1) / walks};
}

INLINE float entry(const sizes *m, int64_t h, int64_t t) { return m->table ? m->table[h * m->positions + t] : 1; }

INLINE void weigh(enum type type, const sizes *m, walk w, const void *kvr, const float *bias, void *source, float *total,
                  void *gate) {
    const int64_t b = w.b, T = m->T, N = m->N, C = m->H * N;
    float before[C], sum[C];
    memset(before, 0, sizeof before);
    memset(sum, 0, sizeof sum);
    for (int64_t t = 0; t < T; t++) {
        if (t % SPAN == 0)
            for (int64_t c = w.first * N; c < w.end * N; c++) {
                before[c] += sum[c];
                sum[c] = 0;
            }
        for (int64_t h = w.first; h < w.end; h++) {
            const int64_t at = (b * T + t) * C + h * N;
            const float *kbias = bias + h * N, *vbias = kbias + C, *rbias = vbias + C, *past = before + h * N;
            float *now = sum + h * N;
            const void *k = from(type, kvr, (b * T + t) * 3 * C + h * N), *v = from(type, k, C), *r = from(type, v, C);
            const float alpha = entry(m, h, t);
            void *s = into(type, source, ((h * T + t) * m->B + b) * N);
#pragma omp simd
            for (int64_t n = 0; n < N; n++) {
                const float e = exp_key(get(type, k, n) + kbias[n]);
                put(type, s, n, alpha * e * (get(type, v, n) + vbias[n]));
                now[n] += e;
                total[at + n] = past[n] + now[n];
                put(type, gate, at + n, sigmoid(get(type, r, n) + rbias[n]));
            }
        }
    }
}

/* Of k, v, r, which are kvr (B, T, 3, H, N) + bias: source (H, T, B, N) = alpha exp(k) v, total (B, T, H, N) the running sum
   of exp(k), and gate (B, T, H, N) = sigmoid(r). The table is alpha. */
void timemix_weigh(int64_t type, int64_t threads, const sizes *m, const void *kvr, const float *bias, void *source, float *total,
                   void *gate) {
    const int64_t each = walks(m, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < m->B * each; task++) {
        const walk w = walk_of(m, each, task);
        if (type == FLOAT32) weigh(FLOAT32, m, w, kvr, bias, source, total, gate);
        else weigh(BFLOAT16, m, w, kvr, bias, source, total, gate);
    }
}

INLINE void weigh_back(enum type type, const sizes *m, walk w, const void *kvr, const float *bias, const void *gate,
                       const void *dsource, const float *dtotal, const void *dgate, void *dkvr, float *dbias,
                       float *dalpha) {
    const int64_t b = w.b, T = m->T, N = m->N, C = m->H * N;
    float after[C], sum[C];
    memset(after, 0, sizeof after);
    memset(sum, 0, sizeof sum);
    for (int64_t t = T; t-- > 0;) {
        if (t % SPAN == SPAN - 1)
            for (int64_t c = w.first * N; c < w.end * N; c++) {
                after[c] += sum[c];
                sum[c] = 0;
            }
        for (int64_t h = w.first; h < w.end; h++) {
            const int64_t at = (b * T + t) * C + h * N, in = (b * T + t) * 3 * C + h * N;
            const float *kbias = bias + h * N, *vbias = kbias + C, *later = after + h * N;
            float *dkbias = dbias + b * 3 * C + h * N, *dvbias = dkbias + C, *drbias = dvbias + C, *now = sum + h * N;
            const void *k = from(type, kvr, in), *v = from(type, k, C);
            const void *ds = from(type, dsource, ((h * T + t) * m->B + b) * N);
            void *dk = into(type, dkvr, in), *dv = into(type, dk, C), *dr = into(type, dv, C);
            if (t > 1) {
                expect(type, k, -6 * C, N);
                expect(type, v, -6 * C, N);
                expect(type, ds, -2 * m->B * N, N);
                expect(type, gate, at - 2 * C, N);
                expect(type, dgate, at - 2 * C, N);
                expect(FLOAT32, dtotal, at - 2 * C, N);
                expect(type, dk, -6 * C, N);
                expect(type, dv, -6 * C, N);
                expect(type, dr, -6 * C, N);
            }
            const float alpha = entry(m, h, t);
            float da = 0;
#pragma omp simd reduction(+ : da)
            for (int64_t n = 0; n < N; n++) {
                const float key = get(type, k, n) + kbias[n], value = get(type, v, n) + vbias[n], e = exp_key(key);
                const float d = get(type, ds, n), y = get(type, gate, at + n);
                now[n] += dtotal[at + n];
                da += d * e * value;
                const float gradient_k = key < -60 || key > 30 ? 0 : (d * alpha * value + (later[n] + now[n])) * e;
                const float gradient_v = d * alpha * e, gradient_r = get(type, dgate, at + n) * y * (1 - y);
                put(type, dk, n, gradient_k);
                put(type, dv, n, gradient_v);
                put(type, dr, n, gradient_r);
                dkbias[n] += gradient_k;
                dvbias[n] += gradient_v;
                drbias[n] += gradient_r;
            }
            if (dalpha) dalpha[(b * m->H + h) * T + t] = da;
        }
    }
}

/* dkvr, and each text's part of the gradients of bias (B, 3 C) and of alpha (B, H, T). */
void timemix_weigh_back(int64_t type, int64_t threads, const sizes *m, const void *kvr, const float *bias, const void *gate,
                        const void *dsource, const float *dtotal, const void *dgate, void *dkvr, float *dbias,
                        float *dalpha) {
    const int64_t each = walks(m, threads);
    memset(dbias, 0, m->B * 3 * m->H * m->N * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < m->B * each; task++) {
        const walk w = walk_of(m, each, task);
        if (type == FLOAT32) weigh_back(FLOAT32, m, w, kvr, bias, gate, dsource, dtotal, dgate, dkvr, dbias, dalpha);
        else weigh_back(BFLOAT16, m, w, kvr, bias, gate, dsource, dtotal, dgate, dkvr, dbias, dalpha);
    }
}

/* The i-th row of the order in which rows are taken: each thread its own texts, as in the walks, whose results its cache
   holds; of these all at a position before the next position, as numerators lie. */
INLINE int64_t row_of(const sizes *m, int64_t threads, int64_t i) {
    const int64_t each = (m->B + threads - 1) / threads, first = i / (each * m->T) * each;
    const int64_t texts = m->B - first < each ? m->B - first : each, rest = i - first * m->T;
    return (first + rest % texts) * m->T + rest / texts;
}

INLINE void divide(enum type type, const sizes *m, int64_t row, int64_t h, const void *numerator, const float *total,
                   const void *gate, void *y) {
    const int64_t b = row / m->T, t = row % m->T, N = m->N, at = (row * m->H + h) * N;
    const void *sums = from(type, numerator, ((h * m->T + t) * m->B + b) * N);
    const float beta = entry(m, h, t);
#pragma omp simd
    for (int64_t n = 0; n < N; n++)
        put(type, y, at + n, get(type, gate, at + n) * beta * (get(type, sums, n) / total[at + n]));
}

/* y (B, T, H, N) = gate beta numerator / total, from numerator (H, T, B, N). The table is beta. */
void timemix_divide(int64_t type, int64_t threads, const sizes *m, const void *numerator, const float *total, const void *gate, void *y) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < m->T * m->B; i++)
        for (int64_t row = row_of(m, threads, i), h = 0; h < m->H; h++) {
            if (type == FLOAT32) divide(FLOAT32, m, row, h, numerator, total, gate, y);
            else divide(BFLOAT16, m, row, h, numerator, total, gate, y);
        }
}

INLINE void divide_back(enum type type, const sizes *m, int64_t row, int64_t h, const void *numerator, const float *total,
                        const void *gate, const void *dy, void *dnumerator, float *dtotal, void *dgate, float *dbeta) {
    const int64_t T = m->T, b = row / T, t = row % T, N = m->N;
    const int64_t at = (row * m->H + h) * N, there = ((h * T + t) * m->B + b) * N;
    const float beta = entry(m, h, t);
    float db = 0;
#pragma omp simd reduction(+ : db)
    for (int64_t n = 0; n < N; n++) {
        const float inverse = 1 / total[at + n], average = get(type, numerator, there + n) * inverse;
        const float d = get(type, dy, at + n), gated = d * get(type, gate, at + n);
        put(type, dgate, at + n, d * beta * average);
        db += gated * average;
        put(type, dnumerator, there + n, gated * beta * inverse);
        dtotal[at + n] = -gated * beta * average * inverse;
    }
    if (dbeta) dbeta[(b * m->H + h) * T + t] = db;
}

/* Gradients of numerator, total and gate, and each text's part of that of beta (B, H, T). */
void timemix_divide_back(int64_t type, int64_t threads, const sizes *m, const void *numerator, const float *total, const void *gate,
                         const void *dy, void *dnumerator, float *dtotal, void *dgate, float *dbeta) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < m->T * m->B; i++)
        for (int64_t row = row_of(m, threads, i), h = 0; h < m->H; h++) {
            if (type == FLOAT32)
                divide_back(FLOAT32, m, row, h, numerator, total, gate, dy, dnumerator, dtotal, dgate, dbeta);
            else divide_back(BFLOAT16, m, row, h, numerator, total, gate, dy, dnumerator, dtotal, dgate, dbeta);
        }
}

/* matrices (H, rows <= columns, columns): f(columns - rows + i - j) at [i, j], 0 in the future, from f (H, lags), 0 past its
   end. */
void timemix_toeplitz(int64_t type, int64_t threads, int64_t H, int64_t rows, int64_t columns, int64_t lags, const void *f,
                      void *matrices) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < H * rows; row++) {
        const int64_t size = type == FLOAT32 ? 4 : 2, last = columns - rows + row % rows;
        const int64_t first = last < lags ? 0 : last - lags + 1, end = last + 1;
        const void *of_head = (const char *)f + row / rows * lags * size;
        char *y = (char *)matrices + row * columns * size;
        memset(y, 0, first * size);
        if (type == FLOAT32)
            for (int64_t j = first; j < end; j++) ((float *)y)[j] = ((const float *)of_head)[last - j];
        else
            for (int64_t j = first; j < end; j++) ((uint16_t *)y)[j] = ((const uint16_t *)of_head)[last - j];
        memset(y + end * size, 0, (columns - end) * size);
    }
}

/* sums (H, rows + columns - 1) over each diagonal i - j = 1 - columns ... rows - 1 of pairs (H, rows, columns). */
void timemix_diagonal_sums(int64_t type, int64_t threads, int64_t H, int64_t rows, int64_t columns, const void *pairs, float *sums) {
    memset(sums, 0, H * (rows + columns - 1) * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t h = 0; h < H; h++)
        for (int64_t i = 0; i < rows; i++) {
            const void *row = from(type, pairs, (h * rows + i) * columns);
            float *y = sums + h * (rows + columns - 1) + i + columns - 1;
            if (type == FLOAT32)
                for (int64_t j = 0; j < columns; j++) y[-j] += get(FLOAT32, row, j);
            else
                for (int64_t j = 0; j < columns; j++) y[-j] += get(BFLOAT16, row, j);
        }
}

/* The normal distribution up to x, and its density there; within 1.5e-7 (Abramowitz and Stegun 7.1.26). */
INLINE float normal(float x, float *density) {
    const float z = fabsf(x) * 0.70710678f, t = 1 / (1 + 0.3275911f * z), e = exponential(-z * z);
    const float high = 1.421413741f + t * (-1.453152027f + t * 1.061405429f);
    const float tail = 0.5f * e * t * (0.254829592f + t * (-0.284496736f + t * high));
    *density = 0.39894228f * e;
    return x < 0 ? tail : 1 - tail;
}

/* An activation and its slope. */
INLINE float activate(enum activation kind, float x, float *slope) {
    if (kind == GELU) {
        float density;
        const float below = normal(x, &density);
        *slope = below + x * density;
        return x * below;
    }
    if (kind == MISH) {
        /* With e = exp(x), n = e (e + 2), d = n + 2: x n / d, of slope n / d + 4 x e (1 + e) / d^2. */
        const float e = exponential(x > 20 ? 20 : x), n = e * (e + 2), inverse = 1 / (n + 2);
        *slope = (n + 4 * x * e * (1 + e) * inverse) * inverse;
        return x * n * inverse;
    }
    if (kind == RELU2) {
        const float positive = x < 0 ? 0 : x;
        *slope = 2 * positive;
        return positive * positive;
    }
    const float y = sigmoid(x);
    *slope = y * (1 + x * (1 - y));
    return x * y;
}

/* Sizes of channel-mix: rows of k (F), v (F) and r (C). */
typedef struct {
    int64_t rows, F, C, activation;
} ffn;

INLINE void gates(enum type type, enum activation kind, const ffn *f, int64_t row, const void *kvr, const float *bias,
                  void *hidden, void *gate) {
    const int64_t F = f->F, C = f->C;
    const void *k = from(type, kvr, row * (2 * F + C)), *v = from(type, k, F), *r = from(type, v, F);
    const float *vbias = bias + F, *rbias = vbias + F;
    void *h = into(type, hidden, row * F), *g = into(type, gate, row * C);
    float slope;
#pragma omp simd private(slope)
    for (int64_t i = 0; i < F; i++)
        put(type, h, i, activate(kind, get(type, k, i) + bias[i], &slope) * (get(type, v, i) + vbias[i]));
#pragma omp simd
    for (int64_t c = 0; c < C; c++) put(type, g, c, sigmoid(get(type, r, c) + rbias[c]));
}

INLINE void gates_back(enum type type, enum activation kind, const ffn *f, int64_t row, const void *kvr,
                       const float *bias, const void *gate, const void *dhidden, const void *dgate, void *dkvr,
                       float *dbias) {
    const int64_t F = f->F, C = f->C, at = row * (2 * F + C);
    const void *k = from(type, kvr, at), *v = from(type, k, F), *dh = from(type, dhidden, row * F);
    const float *vbias = bias + F;
    void *dk = into(type, dkvr, at), *dv = into(type, dk, F), *dr = into(type, dv, F);
    float *dvbias = dbias + F, *drbias = dvbias + F, slope;
#pragma omp simd private(slope)
    for (int64_t i = 0; i < F; i++) {
        const float d = get(type, dh, i), gradient_v = d * activate(kind, get(type, k, i) + bias[i], &slope);
        const float gradient_k = d * (get(type, v, i) + vbias[i]) * slope;
        put(type, dk, i, gradient_k);
        put(type, dv, i, gradient_v);
        dbias[i] += gradient_k;
        dvbias[i] += gradient_v;
    }
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
        const float y = get(type, gate, row * C + c), gradient = get(type, dgate, row * C + c) * y * (1 - y);
        put(type, dr, c, gradient);
        drbias[c] += gradient;
    }
}

#define OF_KIND(function, type, kind, ...)                       \
    switch (kind) {                                              \
    case GELU: function(type, GELU, __VA_ARGS__); break;         \
    case MISH: function(type, MISH, __VA_ARGS__); break;         \
    case RELU2: function(type, RELU2, __VA_ARGS__); break;       \
    default: function(type, SILU, __VA_ARGS__);                  \
    }

/* Of k, v, r, which are kvr + bias: hidden (rows, F) = activation(k) v, and gate (rows, C) = sigmoid(r). */
void timemix_gates(int64_t type, int64_t threads, const ffn *f, const void *kvr, const float *bias, void *hidden, void *gate) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < f->rows; row++) {
        if (type == FLOAT32) OF_KIND(gates, FLOAT32, f->activation, f, row, kvr, bias, hidden, gate)
        else OF_KIND(gates, BFLOAT16, f->activation, f, row, kvr, bias, hidden, gate)
    }
}

/* dkvr, and the parts of the gradient of bias (PARTS, 2 F + C). */
void timemix_gates_back(int64_t type, int64_t threads, const ffn *f, const void *kvr, const float *bias, const void *gate,
                        const void *dhidden, const void *dgate, void *dkvr, float *dbias) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < PARTS; part++) {
        float *db = dbias + part * (2 * f->F + f->C);
        memset(db, 0, (2 * f->F + f->C) * sizeof(float));
        for (int64_t row = f->rows * part / PARTS; row < f->rows * (part + 1) / PARTS; row++) {
            if (type == FLOAT32)
                OF_KIND(gates_back, FLOAT32, f->activation, f, row, kvr, bias, gate, dhidden, dgate, dkvr, db)
            else OF_KIND(gates_back, BFLOAT16, f->activation, f, row, kvr, bias, gate, dhidden, dgate, dkvr, db)
        }
    }
}

INLINE void scale(enum type type, int64_t row, int64_t C, const void *x, const float *bias, const void *gate,
                  const float *gamma, void *y) {
    if (gate) {
#pragma omp simd
        for (int64_t c = 0; c < C; c++)
            put(type, y, row * C + c, get(type, gate, row * C + c) * (get(type, x, row * C + c) + bias[c]));
    } else {
#pragma omp simd
        for (int64_t c = 0; c < C; c++) put(type, y, row * C + c, *gamma * (get(type, x, row * C + c) + bias[c]));
    }
}

/* y = (x + bias) times gate, all (B, T, C); or, where gate is NULL, times gamma (T,). */
void timemix_scale(int64_t type, int64_t threads, int64_t B, int64_t T, int64_t C, const void *x, const float *bias, const void *gate,
                   const float *gamma, void *y) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < B * T; row++) {
        const float *of_row = gate ? NULL : gamma + row % T;
        if (type == FLOAT32) scale(FLOAT32, row, C, x, bias, gate, of_row, y);
        else scale(BFLOAT16, row, C, x, bias, gate, of_row, y);
    }
}

INLINE float scale_back(enum type type, int64_t row, int64_t C, const void *x, const float *bias, const void *gate,
                        const float *gamma, const void *dy, void *dx, float *dbias, void *dgate) {
    float sum = 0;
    if (gate) {
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
            const float d = get(type, dy, row * C + c), gradient = d * get(type, gate, row * C + c);
            put(type, dgate, row * C + c, d * (get(type, x, row * C + c) + bias[c]));
            put(type, dx, row * C + c, gradient);
            dbias[c] += gradient;
        }
    } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < C; c++) {
            const float d = get(type, dy, row * C + c), gradient = d * *gamma;
            sum += d * (get(type, x, row * C + c) + bias[c]);
            put(type, dx, row * C + c, gradient);
            dbias[c] += gradient;
        }
    }
    return sum;
}

/* dx, the parts of the gradient of bias (PARTS, C), and dgate, or each text's part of that of gamma (B, T). */
void timemix_scale_back(int64_t type, int64_t threads, int64_t B, int64_t T, int64_t C, const void *x, const float *bias,
                        const void *gate, const float *gamma, const void *dy, void *dx, float *dbias, void *dgate,
                        float *dgamma) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < PARTS; part++) {
        float *db = dbias + part * C;
        memset(db, 0, C * sizeof(float));
        for (int64_t row = B * T * part / PARTS; row < B * T * (part + 1) / PARTS; row++) {
            const float *of_row = gate ? NULL : gamma + row % T;
            const float sum = type == FLOAT32 ? scale_back(FLOAT32, row, C, x, bias, gate, of_row, dy, dx, db, dgate)
                                              : scale_back(BFLOAT16, row, C, x, bias, gate, of_row, dy, dx, db, dgate);
            if (dgamma) dgamma[row] = sum;
        }
    }
}
