/* Gates of the channel-mix, between its matrix products, forward and backward.

   A row of kvr holds k (F,), v (F,) and r (C,) side by side, without their biases. The kernels add the biases:

    hidden = act(k) v,   gate = sigmoid(r)

   Backward:

    dk = dhidden v act'(k),   dv = dhidden act(k),   dr = dgate gate (1 - gate),   dbias = sum over rows of dkvr */

#include "ops/common/activations.h"
#include "ops/common/exp.h"
#include "ops/common/types.h"

/* rows is B T, F is the hidden size, C is the number of channels, and activation is an `enum activation`. */
typedef struct {
    int64_t rows, F, C, activation;
} ffn;

/* One row: kvr (2 F + C,) -> hidden (F,), gate (C,). */
INLINE void gates(enum type type, enum activation kind, const ffn *f, int64_t row, const void *kvr, const float *bias,
                  void *hidden, void *gate) {
    const int64_t F = f->F, C = f->C;
    const void *k = from(type, kvr, row * (2 * F + C)), *v = from(type, k, F), *r = from(type, v, F);
    const float *vbias = bias + F, *rbias = vbias + F;
    void *h = into(type, hidden, row * F), *g = into(type, gate, row * C);
    float slope;
#pragma omp simd private(slope)
    for (int64_t i = 0; i < F; i++)
        store(type, h, i, activate(kind, load(type, k, i) + bias[i], &slope) * (load(type, v, i) + vbias[i]));
#pragma omp simd
    for (int64_t c = 0; c < C; c++) store(type, g, c, sigmoid_series(load(type, r, c) + rbias[c]));
}

/* One row: dhidden (F,), dgate (C,) -> dkvr (2 F + C,). The row is added to dbias (2 F + C,). act(k) is recomputed. */
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
        const float d = load(type, dh, i), gradient_v = d * activate(kind, load(type, k, i) + bias[i], &slope);
        const float gradient_k = d * (load(type, v, i) + vbias[i]) * slope;
        store(type, dk, i, gradient_k);
        store(type, dv, i, gradient_v);
        dbias[i] += gradient_k;
        dvbias[i] += gradient_v;
    }
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
        const float y = load(type, gate, row * C + c), gradient = load(type, dgate, row * C + c) * y * (1 - y);
        store(type, dr, c, gradient);
        drbias[c] += gradient;
    }
}

/* hidden (rows, F) = act(k) v, gate (rows, C) = sigmoid(r), from kvr (rows, 2 F + C) + bias (2 F + C,). */
void timemix_gates(int64_t type, int64_t threads, const ffn *f, const void *kvr, const float *bias, void *hidden,
                   void *gate) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < f->rows; row++) {
        if (type == FLOAT32) OF_KIND(gates, FLOAT32, f->activation, f, row, kvr, bias, hidden, gate)
        else OF_KIND(gates, BFLOAT16, f->activation, f, row, kvr, bias, hidden, gate)
    }
}

/* Computes dkvr (rows, 2 F + C), and in dbias (PARTS, 2 F + C) sums over parts of the rows. The parts are the same for
   any number of threads. */
void timemix_gates_back(int64_t type, int64_t threads, const ffn *f, const void *kvr, const float *bias,
                        const void *gate, const void *dhidden, const void *dgate, void *dkvr, float *dbias) {
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
