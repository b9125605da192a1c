/* An activation, forward and backward: y = act(x), dx = dy act'(x). act'(x) is computed again from x. */

#include "ops/common/activations.h"
#include "ops/common/types.h"

INLINE void activate_all(enum type type, enum activation kind, int64_t first, int64_t end, const void *x, void *y) {
    float slope;
#pragma omp simd private(slope)
    for (int64_t i = first; i < end; i++) store(type, y, i, activate(kind, load(type, x, i), &slope));
}

INLINE void activate_all_back(enum type type, enum activation kind, int64_t first, int64_t end, const void *x,
                              const void *dy, void *dx) {
    float slope;
#pragma omp simd private(slope)
    for (int64_t i = first; i < end; i++) {
        activate(kind, load(type, x, i), &slope);
        store(type, dx, i, load(type, dy, i) * slope);
    }
}

/* y (n,) = act(x) for x (n,), where kind is an `enum activation`. */
void timemix_activate(int64_t type, int64_t threads, int64_t n, int64_t kind, const void *x, void *y) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < PARTS; part++) {
        const int64_t first = n * part / PARTS, end = n * (part + 1) / PARTS;
        if (type == FLOAT32) OF_KIND(activate_all, FLOAT32, kind, first, end, x, y)
        else OF_KIND(activate_all, BFLOAT16, kind, first, end, x, y)
    }
}

/* dx (n,) from dy (n,). */
void timemix_activate_back(int64_t type, int64_t threads, int64_t n, int64_t kind, const void *x, const void *dy,
                           void *dx) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < PARTS; part++) {
        const int64_t first = n * part / PARTS, end = n * (part + 1) / PARTS;
        if (type == FLOAT32) OF_KIND(activate_all_back, FLOAT32, kind, first, end, x, dy, dx)
        else OF_KIND(activate_all_back, BFLOAT16, kind, first, end, x, dy, dx)
    }
}
