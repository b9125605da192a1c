/* The time-mix of RWKV-7 between its matrix products, forward and backward, in one loop over tokens.

   Inputs of a token and a head: the products r, k, v, decay, rate, residual and gate, and `first`, the v of layer 0.
   The biases of decay, rate and residual are added here. The other vectors are removal, replacement, bonus, weight,
   bias.

    m = exp(-exp(-1/2) sigmoid(decay)) - 1          e = sigmoid(rate)          s = sigmoid(residual)
    v' = v + (first - v) s                          k' = k (1 + (e - 1) replacement)
    z = k removal                                   q = z / max(|z|, 1e-12)
    y = wkv7(r, m, k', v', -q, q e)                 unit = (y - mean(y)) / sqrt(variance(y) + epsilon)
    p = sum(r k' bonus)                             out = gate (unit weight + bias + p v')

   Backward, with dX the gradient of the loss for X, and g = dout gate:

    dgate = dout out / gate     dy = (h - mean(h) - unit mean(h unit)) / sqrt(variance(y) + epsilon),   h = g weight
    dp = sum(g v')              wkv7 gives dr, dlog m, dk', dv', da and db from dy, for a = -q and b = q e
    dr += dp k' bonus           dk' += dp r bonus                          dv' += p g
    dq = db e - da              de = db q + dk' k replacement              dz = (dq - q sum(q dq)) / |z|
    dk = dk' (1 + (e - 1) replacement) + dz removal                        drate = de e (1 - e)
    dv = dv' (1 - s)            dfirst = dv' s                             dresidual = dv' (first - v) s (1 - s)

   The loops read products and write gradients in the type of the products. The numbers between them are float32, stay
   in the cache, and are computed again in the backward pass. Products, gradients and out are (B, T, H, N). */

#include "ops/rwkv7/wkv7.c"

/* -exp(-1/2), the least log-decay. */
#define LEAST -0.60653066f

typedef struct {
    int64_t B, T, H, N;
    float epsilon;
    const void *r, *k, *v, *decay, *rate, *residual, *gate;
    /* In layer 0, `residual` and `first` are NULL, and v' = v. */
    const float *first;
    /* resets (B, T), or NULL. */
    const uint8_t *resets;
} mix_inputs;

typedef struct {
    void *r, *k, *v, *decay, *rate, *residual, *gate;
    float *first;
} mix_gradients;

/* Vectors (H, N), and their gradients summed over the tokens of a sequence (B, H, N). */
typedef struct {
    const float *decay, *rate, *residual, *removal, *replacement, *bonus, *weight, *bias;
} mix_vectors;

typedef struct {
    float *decay, *rate, *residual, *removal, *replacement, *bonus, *weight, *bias;
} mix_sums;

/* Numbers of a token and a head: those of wkv7 with a = -q, and w = sigmoid(decay). inverse is one number 1 / |z|. */
typedef struct {
    wkv7_token of;
    float *w, *e, *s, *inverse;
} mix_token;

INLINE mix_token mix_token_of(head_scratch *s) {
    return (mix_token){token_of(s), array_of(s), array_of(s), array_of(s), array_of(s)};
}

/* Prefetches the inputs at a later token. Tokens are H N numbers apart, and some processors do not predict such
   addresses. */
INLINE void read_ahead(enum type type, const mix_inputs *x, int64_t at) {
    const void *const inputs[] = {x->r, x->k, x->v, x->decay, x->rate, x->gate};
    for (int i = 0; i < 6; i++) prefetch(type, inputs[i], at, x->N);
    if (!x->first) return;
    prefetch(type, x->residual, at, x->N);
    prefetch(FLOAT32, x->first, at, x->N);
}

/* Computes the arguments of wkv7. The head starts at `at` in the products, and at c in the vectors. */
INLINE void before_wkv7(enum type type, int64_t N, mix_inputs x, mix_vectors p, int64_t at, int64_t c,
                        mix_token t) {
    read_ahead(type, &x, at + 2 * x.H * N);
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t j = 0; j < N; j++) {
        const float key = load(type, x.k, at + j), z = key * p.removal[c + j];
        t.of.r[j] = load(type, x.r, at + j);
        t.of.v[j] = load(type, x.v, at + j);
        t.w[j] = sigmoid_series(load(type, x.decay, at + j) + p.decay[c + j]);
        t.e[j] = sigmoid_series(load(type, x.rate, at + j) + p.rate[c + j]);
        t.of.m[j] = expm1_series(LEAST * t.w[j]);
        t.of.k[j] = key * (1 + (t.e[j] - 1) * p.replacement[c + j]);
        t.of.a[j] = -z;
        square += z * z;
    }
    const float length = sqrtf(square), inverse = 1 / (length < 1e-12f ? 1e-12f : length);
    *t.inverse = inverse;
#pragma omp simd
    for (int64_t j = 0; j < N; j++) {
        t.of.a[j] *= inverse;
        t.of.b[j] = -t.of.a[j] * t.e[j];
    }
    if (!x.first) return;
#pragma omp simd
    for (int64_t j = 0; j < N; j++) {
        t.s[j] = sigmoid_series(load(type, x.residual, at + j) + p.residual[c + j]);
        t.of.v[j] += (x.first[at + j] - t.of.v[j]) * t.s[j];
    }
}

/* Statistics of y, and p = sum(r k' bonus). */
typedef struct {
    float mean, scale, p;
} mix_head;

INLINE mix_head statistics(int64_t N, float epsilon, const float *bonus, mix_token t) {
    float sum = 0, variance = 0, p = 0;
#pragma omp simd reduction(+ : sum, p)
    for (int64_t j = 0; j < N; j++) {
        sum += t.of.y[j];
        p += t.of.r[j] * t.of.k[j] * bonus[j];
    }
    const float mean = sum / N;
#pragma omp simd reduction(+ : variance)
    for (int64_t j = 0; j < N; j++) variance += (t.of.y[j] - mean) * (t.of.y[j] - mean);
    return (mix_head){mean, 1 / sqrtf(variance / N + epsilon), p};
}

/* Computes out (N,) from y. */
INLINE void after_wkv7(enum type type, int64_t N, mix_inputs x, mix_vectors p, int64_t at, int64_t c,
                       mix_token t, void *out) {
    const mix_head h = statistics(N, x.epsilon, p.bonus + c, t);
#pragma omp simd
    for (int64_t j = 0; j < N; j++) {
        const float unit = (t.of.y[j] - h.mean) * h.scale, normed = unit * p.weight[c + j] + p.bias[c + j];
        store(type, out, at + j, (normed + h.p * t.of.v[j]) * load(type, x.gate, at + j));
    }
}

/* Computes dgate and dy (N,), and adds to dr, dk and dv (N,), which hold zeros, the gradients that pass wkv7 by.
   `own` is the position of the head in the sums. */
INLINE void after_wkv7_back(enum type type, int64_t N, mix_inputs x, mix_vectors p, int64_t at, int64_t c,
                            mix_token t, const void *dout, mix_gradients d, mix_sums sums,
                            int64_t own, float *dy, float *dr, float *dk, float *dv) {
    const mix_head h = statistics(N, x.epsilon, p.bonus + c, t);
    float dp = 0, mean = 0, product = 0;
#pragma omp simd reduction(+ : dp, mean, product)
    for (int64_t j = 0; j < N; j++) {
        const float unit = (t.of.y[j] - h.mean) * h.scale, dout_j = load(type, dout, at + j);
        const float g = dout_j * load(type, x.gate, at + j);
        store(type, d.gate, at + j, dout_j * (unit * p.weight[c + j] + p.bias[c + j] + h.p * t.of.v[j]));
        sums.weight[own + j] += g * unit;
        sums.bias[own + j] += g;
        dp += g * t.of.v[j];
        dv[j] = h.p * g;
        dy[j] = g * p.weight[c + j];
        mean += dy[j];
        product += dy[j] * unit;
    }
    mean /= N;
    product /= N;
#pragma omp simd
    for (int64_t j = 0; j < N; j++) {
        dy[j] = h.scale * (dy[j] - mean - (t.of.y[j] - h.mean) * h.scale * product);
        dr[j] = dp * t.of.k[j] * p.bonus[c + j];
        dk[j] = dp * t.of.r[j] * p.bonus[c + j];
        sums.bonus[own + j] += dp * t.of.r[j] * t.of.k[j];
    }
}

/* Computes the gradients of the products (N,) from the gradients of the arguments of wkv7. dw is that of log(1 + m). */
INLINE void before_wkv7_back(enum type type, int64_t N, mix_inputs x, mix_vectors p, int64_t at, int64_t c,
                             mix_token t, wkv7_gradients g, mix_gradients d, mix_sums sums,
                             int64_t own) {
    float along = 0, dq[MOST];
    const float inverse = *t.inverse;
#pragma omp simd reduction(+ : along)
    for (int64_t j = 0; j < N; j++) {
        dq[j] = g.b[j] * t.e[j] - g.a[j];
        along -= t.of.a[j] * dq[j];
    }
    /* The length of a shorter z is replaced by a constant. */
    if (inverse >= 1e12f) along = 0;
#pragma omp simd
    for (int64_t j = 0; j < N; j++) {
        const float key = load(type, x.k, at + j), replacement = p.replacement[c + j], e = t.e[j], w = t.w[j];
        const float dz = (dq[j] + t.of.a[j] * along) * inverse, de = g.k[j] * key * replacement - g.b[j] * t.of.a[j];
        const float drate = de * e * (1 - e), ddecay = g.w[j] * LEAST * w * (1 - w);
        store(type, d.r, at + j, g.r[j]);
        store(type, d.k, at + j, g.k[j] * (1 + (e - 1) * replacement) + dz * p.removal[c + j]);
        store(type, d.rate, at + j, drate);
        store(type, d.decay, at + j, ddecay);
        sums.rate[own + j] += drate;
        sums.decay[own + j] += ddecay;
        sums.removal[own + j] += dz * key;
        sums.replacement[own + j] += g.k[j] * key * (e - 1);
    }
    if (!x.first) {
#pragma omp simd
        for (int64_t j = 0; j < N; j++) store(type, d.v, at + j, g.v[j]);
        return;
    }
#pragma omp simd
    for (int64_t j = 0; j < N; j++) {
        const float s = t.s[j], value = load(type, x.v, at + j);
        const float dresidual = g.v[j] * (x.first[at + j] - value) * s * (1 - s);
        store(type, d.v, at + j, g.v[j] * (1 - s));
        store(type, d.residual, at + j, dresidual);
        d.first[at + j] = g.v[j] * s;
        sums.residual[own + j] += dresidual;
    }
}

INLINE void mix_head_forward(const int K, enum type type, const mix_inputs *x, const mix_vectors *p, int64_t row,
                             int64_t head, float *state, void *out, float *starts, float *memory) {
    const int64_t N = x->N, size = N * PADDED(N);
    head_scratch scratch = scratch_of(N, memory);
    const mix_token t = mix_token_of(&scratch);
    float *S = scratch.states;
    transpose_in(N, state, S);
    for (int64_t i = 0; i < x->T; i++) {
        const int64_t token = row * x->T + i, at = (token * x->H + head) * N;
        if (starts && i % CHUNK == 0) memcpy(starts + i / CHUNK * size, S, size * sizeof(float));
        if (x->resets && x->resets[token]) memset(S, 0, size * sizeof(float));
        before_wkv7(type, N, *x, *p, at, head * N, t);
        wkv7_step(K, N, S, S, t.of);
        after_wkv7(type, N, *x, *p, at, head * N, t, out);
    }
    transpose_out(N, S, state);
}

INLINE void mix_head_back(const int K, enum type type, const mix_inputs *x, const mix_vectors *p, int64_t row,
                          int64_t head, const float *starts, const void *dout, float *dstate, const mix_gradients *d,
                          const mix_sums *sums, float *memory) {
    const int64_t N = x->N, size = N * PADDED(N), own = (row * x->H + head) * N;
    head_scratch scratch = scratch_of(N, memory);
    mix_token tokens[CHUNK];
    for (int64_t i = 0; i < CHUNK; i++) tokens[i] = mix_token_of(&scratch);
    const wkv7_gradients g = gradients_of(&scratch);
    float *states = scratch.states, *dS = scratch.dS;
    float *dy = array_of(&scratch), *dr = array_of(&scratch), *dk = array_of(&scratch), *dv = array_of(&scratch);
    transpose_in(N, dstate, dS);
    for (int64_t chunk = CHUNKS(x) - 1; chunk >= 0; chunk--) {
        const int64_t first = chunk * CHUNK, count = x->T - first < CHUNK ? x->T - first : CHUNK;
        memcpy(states, starts + chunk * size, size * sizeof(float));
        for (int64_t i = 0; i < count; i++) {
            const int64_t token = row * x->T + first + i;
            float *S = states + i * size;
            if (x->resets && x->resets[token]) memset(S, 0, size * sizeof(float));
            before_wkv7(type, N, *x, *p, (token * x->H + head) * N, head * N, tokens[i]);
            wkv7_step(K, N, S, S + size, tokens[i].of);
        }
        for (int64_t i = count - 1; i >= 0; i--) {
            const int64_t token = row * x->T + first + i, at = (token * x->H + head) * N;
            after_wkv7_back(type, N, *x, *p, at, head * N, tokens[i], dout, *d, *sums, own, dy, dr, dk, dv);
            wkv7_step_back(K, N, states + i * size, tokens[i].of, dy, dS, g);
#pragma omp simd
            for (int64_t j = 0; j < N; j++) {
                g.r[j] += dr[j];
                g.k[j] += dk[j];
                g.v[j] += dv[j];
            }
            before_wkv7_back(type, N, *x, *p, at, head * N, tokens[i], g, *d, *sums, own);
            if (x->resets && x->resets[token]) memset(dS, 0, size * sizeof(float));
        }
    }
    transpose_out(N, dS, dstate);
}

/* Computes out. state (B, H, N, N) holds S before the first token on entry, and S after the last token on return.
   starts (B, H, chunks, N, P) is NULL if no gradients are needed. scratch is (threads, SCRATCH(N)). */
void timemix_time_mix(int64_t threads, int64_t type, const mix_inputs *x, const mix_vectors *p, float *state, void *out,
                      float *starts, float *scratch) {
    const int64_t H = x->H, size = x->N * x->N, stored = CHUNKS(x) * x->N * PADDED(x->N);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++)
        for (int64_t i = FIRST_TASK(x, thread); i < FIRST_TASK(x, thread + 1); i++) {
            float *own = starts ? starts + i * stored : NULL, *S = state + i * size;
            float *memory = scratch + thread * SCRATCH(x->N);
            if (type == FLOAT32)
                WITH_CONSTANT(x->N, mix_head_forward(K, FLOAT32, x, p, i / H, i % H, S, out, own, memory))
            else WITH_CONSTANT(x->N, mix_head_forward(K, BFLOAT16, x, p, i / H, i % H, S, out, own, memory))
        }
}

/* Computes the gradients d of the products. dstate holds the gradient of the last S on entry, and of the first S on
   return. The sums hold zeros on entry. */
void timemix_time_mix_back(int64_t threads, int64_t type, const mix_inputs *x, const mix_vectors *p,
                           const float *starts, const void *dout, float *dstate, const mix_gradients *d,
                           const mix_sums *sums, float *scratch) {
    const int64_t H = x->H, size = x->N * x->N, stored = CHUNKS(x) * x->N * PADDED(x->N);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++)
        for (int64_t i = FIRST_TASK(x, thread); i < FIRST_TASK(x, thread + 1); i++) {
            const float *own = starts + i * stored;
            float *dS = dstate + i * size, *memory = scratch + thread * SCRATCH(x->N);
            if (type == FLOAT32)
                WITH_CONSTANT(x->N, mix_head_back(K, FLOAT32, x, p, i / H, i % H, own, dout, dS, d, sums, memory))
            else WITH_CONSTANT(x->N, mix_head_back(K, BFLOAT16, x, p, i / H, i % H, own, dout, dS, d, sums, memory))
        }
}
