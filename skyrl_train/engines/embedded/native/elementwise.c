/* Parts of a transformer layer that are a dozen memory-bound operations in PyTorch, one pass each; float32. */
#include <math.h>

#include "vector.h"

#define PARALLEL_FROM 32768 /* floats: below, waking the other threads costs more than it saves */

/* out[r] = (weight + offset) * x[r] / rms(x[r]); x and out [rows, dim], dim a multiple of LANES */
void rms_norm(const float *x, const float *weight, float *out, int64_t rows, int64_t dim, float eps, float offset,
              int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && rows * dim >= PARALLEL_FROM)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * dim;
        float *to = out + r * dim;
        vec squares = splat(0);
        for (int64_t d = 0; d < dim; d += LANES) {
            vec v = load(from + d);
            squares += v * v;
        }
        const float scale = 1.0f / sqrtf(sum1(squares) / (float)dim + eps);
        for (int64_t d = 0; d < dim; d += LANES) store(to + d, (load(weight + d) + offset) * (load(from + d) * scale));
    }
}

typedef struct {
    const float *x;                  /* [T, heads, dim] with strides in floats */
    int64_t row_stride, head_stride;
    float *out;                      /* [T, heads, dim] */
    int64_t heads;
} Rotated;

/* Rotary embedding in halves, of queries and keys: out = x * cos + concat(-x2, x1) * sin.
 * cos and sin [T, dim]; dim / 2 a multiple of LANES. */
void rotate(const Rotated *parts, int64_t num_parts, int64_t rows, int64_t dim, const float *cosine, const float *sine,
            int32_t num_threads) {
    const int64_t half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(num_threads) \
    if (num_threads > 1 && rows * parts[0].heads * dim >= PARALLEL_FROM)
    for (int64_t r = 0; r < rows; r++) {
        const float *c = cosine + r * dim, *s = sine + r * dim;
        for (int64_t p = 0; p < num_parts; p++) {
            for (int64_t h = 0; h < parts[p].heads; h++) {
                const float *from = parts[p].x + r * parts[p].row_stride + h * parts[p].head_stride;
                float *to = parts[p].out + (r * parts[p].heads + h) * dim;
                for (int64_t d = 0; d < half; d += LANES) {
                    vec a = load(from + d), b = load(from + half + d);
                    store(to + d, a * load(c + d) - b * load(s + d));
                    store(to + half + d, b * load(c + half + d) + a * load(s + half + d));
                }
            }
        }
    }
}

/* gate = silu(gate) * up, n numbers, a multiple of LANES */
void silu_times(float *gate, const float *up, int64_t n, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && n >= PARALLEL_FROM)
    for (int64_t i = 0; i < n; i += LANES) {
        store(gate + i, silu(load(gate + i)) * load(up + i));
    }
}
