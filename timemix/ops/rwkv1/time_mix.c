/* The time-mix of RWKV from 2021, except for the weighted sum over the past, forward and backward.

    y[t] = sigmoid(r[t]) beta(t) ( sum_{u<=t} f(t-u) alpha(u) exp(k[u]) v[u] ) / ( sum_{u<=t} exp(k[u]) )

   alpha, beta and f belong to a head, all other values to a channel. There are three steps:

    weigh:   source[t] = alpha(t) exp(k[t]) v[t],   total[t] = sum_{u<=t} exp(k[u]),   gate[t] = sigmoid(r[t])
    mix:     numerator[t] = sum_{u<=t} f(t-u) source[u], by the matrix products of ops/rwkv1/parallel.py
    divide:  y[t] = gate[t] beta(t) numerator[t] / total[t]

   k is clamped to [-60, 30]. total is always float32.

   k, v and r are side by side in kvr (B, T, 3, H, N). source and numerator have the layout of the matrix products,
   (H, T, B, N). total, gate and y are (B, T, H, N). */

#include "ops/common/exp.h"
#include "ops/common/types.h"

/* Number of positions in a span of a running sum. Each span is summed from 0 and added to the sum of the earlier spans.
   Adding small terms to a small sum gives a smaller rounding error. */
#define SPAN 64

typedef struct {
    int64_t B, T, H, N, positions;
    const float *table; /* alpha or beta (H, positions), or NULL for 1 */
} sizes;

/* alpha_h(t) or beta_h(t). */
INLINE float entry(const sizes *m, int64_t h, int64_t t) { return m->table ? m->table[h * m->positions + t] : 1; }

/* exp(k), with k clamped to [-60, 30]. */
INLINE float exp_key(float k) { return exp_series(k < -60 ? -60 : k > 30 ? 30 : k); }

/* A task of one thread: heads first to end - 1 of sequence b, at all positions. A task computes all its heads at one
   position before the next position, so that memory is read in order. */
typedef struct {
    int64_t b, first, end;
} task;

/* Number of tasks for each sequence: 1 if there are at least as many sequences as threads, else as many groups of heads
   as the threads need. */
static int64_t tasks_per_sequence(const sizes *m, int64_t threads) {
    const int64_t wanted = m->B < threads ? threads / (m->B ? m->B : 1) : 1;
    return wanted < m->H ? wanted : m->H;
}

/* Task i of B * each tasks, where each sequence has `each` tasks. */
static task task_of(const sizes *m, int64_t each, int64_t i) {
    const int64_t part = i % each;
    return (task){i / each, m->H * part / each, m->H * (part + 1) / each};
}

/* One task, by the formulas at the top of this file. */
INLINE void weigh(enum type type, const sizes *m, task w, const void *kvr, const float *bias, void *source,
                  float *total, void *gate) {
    const int64_t b = w.b, T = m->T, N = m->N, C = m->H * N;
    /* The running sum is before + sum, where before sums all complete spans, and sum is for the current span. */
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
            /* (B, T, H, N) -> (H, T, B, N) */
            void *s = into(type, source, ((h * T + t) * m->B + b) * N);
#pragma omp simd
            for (int64_t n = 0; n < N; n++) {
                const float e = exp_key(load(type, k, n) + kbias[n]);
                store(type, s, n, alpha * e * (load(type, v, n) + vbias[n]));
                now[n] += e;
                total[at + n] = past[n] + now[n];
                store(type, gate, at + n, sigmoid_series(load(type, r, n) + rbias[n]));
            }
        }
    }
}

/* source (H, T, B, N) = alpha exp(k) v, total (B, T, H, N) = running sum of exp(k), gate (B, T, H, N) = sigmoid(r),
   from kvr (B, T, 3, H, N) + bias (3, H, N). The table is alpha. */
void timemix_weigh(int64_t type, int64_t threads, const sizes *m, const void *kvr, const float *bias, void *source,
                   float *total, void *gate) {
    const int64_t each = tasks_per_sequence(m, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < m->B * each; i++) {
        const task w = task_of(m, each, i);
        if (type == FLOAT32) weigh(FLOAT32, m, w, kvr, bias, source, total, gate);
        else weigh(BFLOAT16, m, w, kvr, bias, source, total, gate);
    }
}

/* One task. The formulas use e = exp(k) and x = dsource:

    dk[t] = e (x alpha v + sum_{u>=t} dtotal[u]), 0 where k is clamped;   dv = x alpha e;   dr = dgate gate (1 - gate)
    dalpha(t) = sum_n x e v

   The loop runs backwards in time because of the sum over u >= t. */
INLINE void weigh_back(enum type type, const sizes *m, task w, const void *kvr, const float *bias, const void *gate,
                       const void *dsource, const float *dtotal, const void *dgate, void *dkvr, float *dbias,
                       float *dalpha) {
    const int64_t b = w.b, T = m->T, N = m->N, C = m->H * N;
    /* The sum over u >= t is after + sum, in spans as in weigh. */
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
            /* Prefetch all inputs and outputs of position t - 2. */
            if (t > 1) {
                prefetch(type, k, -6 * C, N);
                prefetch(type, v, -6 * C, N);
                prefetch(type, ds, -2 * m->B * N, N);
                prefetch(type, gate, at - 2 * C, N);
                prefetch(type, dgate, at - 2 * C, N);
                prefetch(FLOAT32, dtotal, at - 2 * C, N);
                prefetch(type, dk, -6 * C, N);
                prefetch(type, dv, -6 * C, N);
                prefetch(type, dr, -6 * C, N);
            }
            const float alpha = entry(m, h, t);
            float da = 0;
#pragma omp simd reduction(+ : da)
            for (int64_t n = 0; n < N; n++) {
                const float key = load(type, k, n) + kbias[n], value = load(type, v, n) + vbias[n], e = exp_key(key);
                const float d = load(type, ds, n), y = load(type, gate, at + n);
                now[n] += dtotal[at + n];
                da += d * e * value;
                const float gradient_k = key < -60 || key > 30 ? 0 : (d * alpha * value + (later[n] + now[n])) * e;
                const float gradient_v = d * alpha * e, gradient_r = load(type, dgate, at + n) * y * (1 - y);
                store(type, dk, n, gradient_k);
                store(type, dv, n, gradient_v);
                store(type, dr, n, gradient_r);
                dkbias[n] += gradient_k;
                dvbias[n] += gradient_v;
                drbias[n] += gradient_r;
            }
            if (dalpha) dalpha[(b * m->H + h) * T + t] = da;
        }
    }
}

/* dkvr (B, T, 3, H, N); dbias (B, 3, H, N) and dalpha (B, H, T) or NULL, which the caller sums over B. */
void timemix_weigh_back(int64_t type, int64_t threads, const sizes *m, const void *kvr, const float *bias,
                        const void *gate, const void *dsource, const float *dtotal, const void *dgate, void *dkvr,
                        float *dbias, float *dalpha) {
    const int64_t each = tasks_per_sequence(m, threads);
    memset(dbias, 0, m->B * 3 * m->H * m->N * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < m->B * each; i++) {
        const task w = task_of(m, each, i);
        if (type == FLOAT32) weigh_back(FLOAT32, m, w, kvr, bias, gate, dsource, dtotal, dgate, dkvr, dbias, dalpha);
        else weigh_back(BFLOAT16, m, w, kvr, bias, gate, dsource, dtotal, dgate, dkvr, dbias, dalpha);
    }
}

/* The i-th row b T + t in the order of processing. Each thread processes the sequences of its tasks in weigh, because
   their results are still in the thread's cache. A thread processes all its sequences at one position before the next
   position, which is the order of the numerator (H, T, B, N) in memory. */
INLINE int64_t row_of(const sizes *m, int64_t threads, int64_t i) {
    const int64_t each = (m->B + threads - 1) / threads, first = i / (each * m->T) * each;
    const int64_t count = m->B - first < each ? m->B - first : each, rest = i - first * m->T;
    return (first + rest % count) * m->T + rest / count;
}

/* One row and one head. */
INLINE void divide(enum type type, const sizes *m, int64_t row, int64_t h, const void *numerator, const float *total,
                   const void *gate, void *y) {
    const int64_t b = row / m->T, t = row % m->T, N = m->N, at = (row * m->H + h) * N;
    /* (H, T, B, N) -> (B, T, H, N) */
    const void *sums = from(type, numerator, ((h * m->T + t) * m->B + b) * N);
    const float beta = entry(m, h, t);
#pragma omp simd
    for (int64_t n = 0; n < N; n++)
        store(type, y, at + n, load(type, gate, at + n) * beta * (load(type, sums, n) / total[at + n]));
}

/* y (B, T, H, N) = gate beta numerator / total, from numerator (H, T, B, N). The table is beta. */
void timemix_divide(int64_t type, int64_t threads, const sizes *m, const void *numerator, const float *total,
                    const void *gate, void *y) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < m->T * m->B; i++)
        for (int64_t row = row_of(m, threads, i), h = 0; h < m->H; h++) {
            if (type == FLOAT32) divide(FLOAT32, m, row, h, numerator, total, gate, y);
            else divide(BFLOAT16, m, row, h, numerator, total, gate, y);
        }
}

/* One row and one head. The formulas use average = numerator / total:

    dgate = dy beta average;   dnumerator = dy gate beta / total;   dtotal = -dy gate beta average / total
    dbeta(t) = sum_n dy gate average */
INLINE void divide_back(enum type type, const sizes *m, int64_t row, int64_t h, const void *numerator,
                        const float *total, const void *gate, const void *dy, void *dnumerator, float *dtotal,
                        void *dgate, float *dbeta) {
    const int64_t T = m->T, b = row / T, t = row % T, N = m->N;
    const int64_t at = (row * m->H + h) * N, there = ((h * T + t) * m->B + b) * N;
    const float beta = entry(m, h, t);
    float db = 0;
#pragma omp simd reduction(+ : db)
    for (int64_t n = 0; n < N; n++) {
        const float inverse = 1 / total[at + n], average = load(type, numerator, there + n) * inverse;
        const float d = load(type, dy, at + n), gated = d * load(type, gate, at + n);
        store(type, dgate, at + n, d * beta * average);
        db += gated * average;
        store(type, dnumerator, there + n, gated * beta * inverse);
        dtotal[at + n] = -gated * beta * average * inverse;
    }
    if (dbeta) dbeta[(b * m->H + h) * T + t] = db;
}

/* dnumerator (H, T, B, N), dtotal and dgate (B, T, H, N); dbeta (B, H, T) or NULL, which the caller sums over B. */
void timemix_divide_back(int64_t type, int64_t threads, const sizes *m, const void *numerator, const float *total,
                         const void *gate, const void *dy, void *dnumerator, float *dtotal, void *dgate, float *dbeta) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < m->T * m->B; i++)
        for (int64_t row = row_of(m, threads, i), h = 0; h < m->H; h++) {
            if (type == FLOAT32)
                divide_back(FLOAT32, m, row, h, numerator, total, gate, dy, dnumerator, dtotal, dgate, dbeta);
            else divide_back(BFLOAT16, m, row, h, numerator, total, gate, dy, dnumerator, dtotal, dgate, dbeta);
        }
}
