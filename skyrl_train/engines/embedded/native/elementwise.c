/* Parts of a transformer layer that are a dozen memory-bound operations in PyTorch, one pass each.
 *
 * Arrays are float32 or bfloat16, arithmetic is float32. In bfloat16 the last digit may differ from PyTorch's, which
 * rounds after each of its operations; where a module of transformers' rounds on purpose, so do these.
 */
#include <math.h>

#include "bfloat16.h"
#include "kernels.h"

#define PARALLEL_FROM 32768 /* numbers: below, waking the other threads costs more than it saves */

INLINE void norm_row(const void *x, const void *weight, void *out, int64_t at, int64_t dim, float eps, float offset,
                     const int is_bfloat16) {
    vec squares = splat(0);
    for (int64_t d = 0; d < dim; d += LANES) {
        vec v = get(x, at + d, is_bfloat16);
        squares += v * v;
    }
    const float scale = 1.0f / sqrtf(sum1(squares) / (float)dim + eps);
    for (int64_t d = 0; d < dim; d += LANES) {
        vec normed = get(x, at + d, is_bfloat16) * scale;
        if (offset == 0) normed = rounded(normed, is_bfloat16); /* Llama's norm, unlike Gemma's */
        set(out, at + d, (get(weight, d, is_bfloat16) + offset) * normed, is_bfloat16);
    }
}

/* out[r] = (weight + offset) * x[r] / rms(x[r]); x and out [rows, dim], dim a multiple of LANES */
void rms_norm(const void *x, const void *weight, void *out, int64_t rows, int64_t dim, float eps, float offset,
              int32_t is_bfloat16, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && rows * dim >= PARALLEL_FROM)
    for (int64_t r = 0; r < rows; r++)
        if (is_bfloat16)
            norm_row(x, weight, out, r * dim, dim, eps, offset, 1);
        else
            norm_row(x, weight, out, r * dim, dim, eps, offset, 0);
}

INLINE void rotate_row(const Rotated *part, int64_t r, int64_t dim, const void *cosine, const void *sine,
                       const int is_bfloat16) {
    const int64_t half = dim / 2, angle = r * dim;
    for (int64_t h = 0; h < part->heads; h++) {
        const int64_t from = r * part->row_stride + h * part->head_stride, to = (r * part->heads + h) * dim;
        for (int64_t d = 0; d < half; d += LANES) {
            vec a = get(part->x, from + d, is_bfloat16), b = get(part->x, from + half + d, is_bfloat16);
            vec c1 = get(cosine, angle + d, is_bfloat16), s1 = get(sine, angle + d, is_bfloat16);
            vec c2 = get(cosine, angle + half + d, is_bfloat16), s2 = get(sine, angle + half + d, is_bfloat16);
            set(part->out, to + d, a * c1 - b * s1, is_bfloat16);
            set(part->out, to + half + d, b * c2 + a * s2, is_bfloat16);
        }
    }
}

/* Rotary embedding in halves, of queries and keys: out = x * cos + concat(-x2, x1) * sin.
 * cos and sin [T, dim]; dim / 2 a multiple of LANES. */
void rotate(const Rotated *parts, int64_t num_parts, int64_t rows, int64_t dim, const void *cosine, const void *sine,
            int32_t is_bfloat16, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) \
    if (num_threads > 1 && rows * parts[0].heads * dim >= PARALLEL_FROM)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t p = 0; p < num_parts; p++)
            if (is_bfloat16)
                rotate_row(parts + p, r, dim, cosine, sine, 1);
            else
                rotate_row(parts + p, r, dim, cosine, sine, 0);
}

/* gate = silu(gate) * up, n numbers, a multiple of LANES */
void silu_times(void *gate, const void *up, int64_t n, int32_t is_bfloat16, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && n >= PARALLEL_FROM)
    for (int64_t i = 0; i < n; i += LANES)
        if (is_bfloat16)
            set(gate, i, silu(get(gate, i, 1)) * get(up, i, 1), 1);
        else
            set(gate, i, silu(get(gate, i, 0)) * get(up, i, 0), 0);
}
