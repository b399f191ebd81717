/* Operations whose result for a row depends on that row and the weights alone; float32.
 *
 * Alone or in any batch, in any chunk, on any number of threads, a row goes through the same additions in the same
 * order:
 *   - sums over a row's numbers run in 16 lanes, in the order of the numbers, and the lanes are added in one order;
 *   - blocks (of rows, of outputs, of queries) only decide which rows are computed side by side, each in lanes or
 *     registers of its own; blocks of keys lie on one grid, that of positions, whoever asks;
 *   - threads split rows and outputs, never a sum;
 *   - this file is compiled with -ffp-contract=off, and fused multiply-adds are written out (`fma16`), so that no two
 *     copies of one expression can be rounded differently.
 * No loop here may sum over what belongs to several rows.
 */
#include <math.h>

#include "vector.h"

#if defined __AVX512F__ || defined __FMA__
#include <immintrin.h>
#elif defined __ARM_NEON
#include <arm_neon.h>
#endif

#define PARALLEL_FROM 32768 /* floats: below, waking the other threads costs more than it saves */

/* a * b + c. One rounding where the processor has it; a choice of the build, the same everywhere in it. */
INLINE vec fma16(vec a, vec b, vec c) {
#if defined __AVX512F__
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined __FMA__
    union { vec v; __m256 part[2]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++) z.part[i] = _mm256_fmadd_ps(x.part[i], y.part[i], z.part[i]);
    return z.v;
#elif defined __ARM_NEON && defined __aarch64__
    union { vec v; float32x4_t part[4]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 4; i++) z.part[i] = vfmaq_f32(z.part[i], x.part[i], y.part[i]);
    return z.v;
#else
    return a * b + c;
#endif
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The first n < 16 numbers, then zeros. */
INLINE vec load_first(const float *p, int64_t n) {
    vec x = {0};
    memcpy(&x, p, n * sizeof(float));
    return x;
}

INLINE void store_first(float *p, vec x, int64_t n) { memcpy(p, &x, n * sizeof(float)); }

/* -- linear maps */

#define OUTPUTS 4
#define OUTPUTS_OF_ONE 8 /* of a single row: more sums in flight */
#define OUTPUT_BLOCK 32
#define ROW_BLOCK 64

/* `rows` x `outs` outputs from (m, n) on; those beyond the end are computed from the last row or output, not stored. */
INLINE void linear_tile(const float *x, const float *weight, const float *bias, float *out, int64_t m, int64_t n,
                        int64_t num_outputs, int64_t depth, const int rows, const int outs) {
    vec sum[4][OUTPUTS_OF_ONE];
    const float *a[4], *b[OUTPUTS_OF_ONE];
    for (int i = 0; i < rows; i++) a[i] = x + (m + i) * depth;
    for (int j = 0; j < outs; j++) b[j] = weight + least(n + j, num_outputs - 1) * depth;
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < outs; j++) sum[i][j] = splat(0);
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
        vec y[OUTPUTS_OF_ONE];
        for (int j = 0; j < outs; j++) y[j] = load(b[j] + k);
        for (int i = 0; i < rows; i++) {
            vec z = load(a[i] + k);
            for (int j = 0; j < outs; j++) sum[i][j] = fma16(z, y[j], sum[i][j]);
        }
    }
    if (k < depth)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < outs; j++)
                sum[i][j] = fma16(load_first(a[i] + k, depth - k), load_first(b[j] + k, depth - k), sum[i][j]);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < outs; j += 4) {
            vec4 total = sum4(sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]);
            for (int t = 0; t < 4 && n + j + t < num_outputs; t++)
                out[(m + i) * num_outputs + n + j + t] = bias ? total[t] + bias[n + j + t] : total[t];
        }
}

/* out = x weight' + bias: x [rows, depth], weight [outputs, depth], bias [outputs] or 0, out [rows, outputs] */
void invariant_linear(const float *x, const float *weight, const float *bias, float *out, int64_t rows, int64_t outputs,
                      int64_t depth, int32_t num_threads) {
    const int64_t row_blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    const int64_t blocks = (outputs + OUTPUT_BLOCK - 1) / OUTPUT_BLOCK;
#pragma omp parallel for collapse(2) schedule(static) num_threads(num_threads) \
    if (num_threads > 1 && rows * outputs * depth >= 8 * PARALLEL_FROM)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t row_block = 0; row_block < row_blocks; row_block++) {
            const int64_t n_end = least((block + 1) * OUTPUT_BLOCK, outputs);
            const int64_t m_end = least((row_block + 1) * ROW_BLOCK, rows);
            int64_t m = row_block * ROW_BLOCK;
#if defined __AVX512F__ /* 32 registers of 16 floats: elsewhere four rows at once would not fit */
            for (; m + 4 <= m_end; m += 4)
                for (int64_t n = block * OUTPUT_BLOCK; n < n_end; n += OUTPUTS)
                    linear_tile(x, weight, bias, out, m, n, outputs, depth, 4, OUTPUTS);
            for (; m + 2 <= m_end; m += 2)
                for (int64_t n = block * OUTPUT_BLOCK; n < n_end; n += OUTPUTS)
                    linear_tile(x, weight, bias, out, m, n, outputs, depth, 2, OUTPUTS);
            for (; m < m_end; m++)
                for (int64_t n = block * OUTPUT_BLOCK; n < n_end; n += OUTPUTS_OF_ONE)
                    linear_tile(x, weight, bias, out, m, n, outputs, depth, 1, OUTPUTS_OF_ONE);
#else
            for (; m < m_end; m++)
                for (int64_t n = block * OUTPUT_BLOCK; n < n_end; n += OUTPUTS)
                    linear_tile(x, weight, bias, out, m, n, outputs, depth, 1, OUTPUTS);
#endif
        }
}

/* -- norm, activation, rotation */

/* out = (weight + offset) * x * scale, scale = 1 / rms(x): x and out [rows, dim], scales [rows] for the gradient */
void invariant_rms_norm(const float *x, const float *weight, float *out, float *scales, int64_t rows, int64_t dim,
                        float eps, float offset, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && rows * dim >= PARALLEL_FROM)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * dim;
        float *to = out + r * dim;
        vec squares = splat(0);
        int64_t d = 0;
        for (; d + LANES <= dim; d += LANES) squares = fma16(load(from + d), load(from + d), squares);
        if (d < dim) {
            vec rest = load_first(from + d, dim - d);
            squares = fma16(rest, rest, squares);
        }
        const float scale = 1.0f / sqrtf(sum1(squares) / (float)dim + eps);
        scales[r] = scale;
        for (d = 0; d + LANES <= dim; d += LANES)
            store(to + d, (load(weight + d) + offset) * (load(from + d) * scale));
        if (d < dim)
            store_first(to + d, (load_first(weight + d, dim - d) + offset) * (load_first(from + d, dim - d) * scale),
                        dim - d);
    }
}

/* out = x * sigmoid(x), n numbers */
void invariant_silu(const float *x, float *out, int64_t n, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && n >= PARALLEL_FROM)
    for (int64_t i = 0; i < n; i += LANES) {
        if (i + LANES <= n)
            store(out + i, silu(load(x + i)));
        else
            store_first(out + i, silu(load_first(x + i, n - i)), n - i);
    }
}

/* Rotary embedding in halves of x [rows, heads, dim] with strides in floats: out = x * cos + concat(-x2, x1) * sin,
 * out [rows, heads, dim], cos and sin [rows, dim]. sign -1 is the gradient's: the transposed map, where
 * out = x * cos + concat(x2 * sin2, -x1 * sin1). */
void invariant_rotate(const float *x, int64_t row_stride, int64_t head_stride, float *out, int64_t rows, int64_t heads,
                      int64_t dim, const float *cosine, const float *sine, float sign, int32_t num_threads) {
    const int64_t half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && rows * heads * dim >= PARALLEL_FROM)
    for (int64_t r = 0; r < rows; r++) {
        const float *c = cosine + r * dim, *s = sine + r * dim;
        /* sine that meets x2 on its way into the first half, and x1 into the second */
        const float *s1 = sign > 0 ? s : s + half, *s2 = sign > 0 ? s + half : s;
        for (int64_t h = 0; h < heads; h++) {
            const float *from = x + r * row_stride + h * head_stride;
            float *to = out + (r * heads + h) * dim;
            for (int64_t d = 0; d < half; d++) {
                const float a = from[d], b = from[half + d];
                to[d] = a * c[d] - sign * b * s1[d];
                to[half + d] = b * c[half + d] + sign * a * s2[d];
            }
        }
    }
}

/* -- attention */

#define KEY_BLOCK 64
#define MAX_QUERIES 64 /* query vectors of a task: rows x heads of a group */
#define MAX_DIM 256
#define MASKED -1e30f

typedef struct {
    const float *query, *keys, *values;
    float *out;                   /* [T, Hq, D] */
    const int64_t *positions;     /* [T]: of each row in its sequence */
    const int64_t *table_start;   /* [R]: where a sequence's slots begin in `table` */
    const int32_t *cu_rows;       /* [R + 1]: rows of each sequence, in the order of their positions */
    const int32_t *table;         /* slot of each position of each sequence */
    const int32_t *task_sequence; /* [N]: sequence of each block of rows */
    const int32_t *task_row;      /* [N]: its first row */
    int64_t query_row, query_head, key_slot, key_head, value_slot, value_head; /* strides in floats */
    int32_t num_tasks, block_rows, num_threads;
    int32_t num_heads, num_kv_heads, head_dim;
    float scaling;
    int32_t window; /* 0: unbounded */
} Attention;

/* Dot products of four query vectors from m on with n keys. */
INLINE void invariant_scores(const Attention *at, const float *q, float *score, int m, const float *keys,
                             const int32_t *slots, int n, const int dim) {
    for (int s = 0; s < n; s++) {
        const float *k = keys + slots[s] * at->key_slot;
        vec dot[4];
        for (int j = 0; j < 4; j++) dot[j] = splat(0);
        for (int d = 0; d < dim; d += LANES)
            for (int j = 0; j < 4; j++) dot[j] = fma16(load(q + (m + j) * dim + d), load(k + d), dot[j]);
        vec4 sums = sum4(dot[0], dot[1], dot[2], dot[3]);
        for (int j = 0; j < 4; j++) score[(m + j) * KEY_BLOCK + s] = sums[j];
    }
}

/* Add n values, weighted, to the sums of four query vectors. */
INLINE void invariant_weigh(const Attention *at, float *acc, const float *score, int m, const float *values,
                            const int32_t *slots, int n, const int dim) {
    for (int d = 0; d < dim; d += LANES) {
        vec sum[4];
        for (int j = 0; j < 4; j++) sum[j] = load(acc + (m + j) * dim + d);
        for (int s = 0; s < n; s++) {
            vec x = load(values + slots[s] * at->value_slot + d);
            for (int j = 0; j < 4; j++) sum[j] = fma16(splat(score[(m + j) * KEY_BLOCK + s]), x, sum[j]);
        }
        for (int j = 0; j < 4; j++) store(acc + (m + j) * dim + d, sum[j]);
    }
}

/* Rows of one sequence against its keys, under one key/value head. What a row may not see gets the weight 0, which adds
 * nothing to its sums: which rows share a task, and how far the others look, is without effect. */
INLINE void invariant_task(const Attention *at, int task, int kv_head, const int dim) {
    const int group = at->num_heads / at->num_kv_heads;
    const int sequence = at->task_sequence[task], row0 = at->task_row[task];
    const int rows = (int)least(at->block_rows, at->cu_rows[sequence + 1] - row0);
    const int queries = rows * group, padded = (queries + 3) & ~3;
    const int32_t *slots = at->table + at->table_start[sequence];
    const float *keys = at->keys + kv_head * at->key_head, *values = at->values + kv_head * at->value_head;
    const int first = (int)at->positions[row0], last = first + rows - 1;
    int from = at->window > 0 && first - at->window + 1 > 0 ? first - at->window + 1 : 0;
    from -= from % KEY_BLOCK;

    float q[MAX_QUERIES * MAX_DIM] __attribute__((aligned(64)));
    float acc[MAX_QUERIES * MAX_DIM] __attribute__((aligned(64)));
    float score[MAX_QUERIES * KEY_BLOCK] __attribute__((aligned(64)));
    float maximum[MAX_QUERIES], total[MAX_QUERIES];

    for (int m = 0; m < padded; m++) {
        const int i = (int)least(m, queries - 1);
        const float *source = at->query + (row0 + i / group) * at->query_row +
                              (kv_head * group + i % group) * at->query_head;
        for (int d = 0; d < dim; d += LANES) {
            store(q + m * dim + d, load(source + d) * at->scaling);
            store(acc + m * dim + d, splat(0));
        }
        maximum[m] = MASKED;
        total[m] = 0;
    }

    for (int block = from; block <= last; block += KEY_BLOCK) {
        const int n = (int)least(KEY_BLOCK, last + 1 - block);
        for (int m = 0; m < padded; m += 4) invariant_scores(at, q, score, m, keys, slots + block, n, dim);
        for (int m = 0; m < padded; m++) {
            const int position = first + (int)least(m, queries - 1) / group;
            float *row = score + m * KEY_BLOCK;
            int begin = 0, until = (int)least(n, position + 1 - block); /* the row may see [begin, until) */
            if (at->window > 0 && position - at->window + 1 > block) begin = position - at->window + 1 - block;
            if (begin >= until) {
                memset(row, 0, KEY_BLOCK * sizeof(float));
                continue;
            }
            for (int s = 0; s < begin; s++) row[s] = MASKED;
            for (int s = until; s < KEY_BLOCK; s++) row[s] = MASKED;
            vec high = load(row);
            for (int s = LANES; s < KEY_BLOCK; s += LANES) high = vmax(high, load(row + s));
            float top = max1(high);
            if (top < maximum[m]) top = maximum[m];
            vec sum = splat(0);
            for (int s = 0; s < KEY_BLOCK; s += LANES) {
                vec w = vexp(load(row + s) - top);
                store(row + s, w);
                sum += w;
            }
            const float keep = vexp(splat(maximum[m] - top))[0];
            total[m] = total[m] * keep + sum1(sum);
            maximum[m] = top;
            if (keep != 1.0f)
                for (int d = 0; d < dim; d += LANES) store(acc + m * dim + d, load(acc + m * dim + d) * keep);
        }
        for (int m = 0; m < padded; m += 4) invariant_weigh(at, acc, score, m, values, slots + block, n, dim);
    }
    for (int m = 0; m < queries; m++) {
        float *target = at->out + ((int64_t)(row0 + m / group) * at->num_heads + kv_head * group + m % group) * dim;
        const float inverse = 1.0f / total[m];
        /* + 0: a weight of 0 may have made +0 of -0 */
        for (int d = 0; d < dim; d += LANES) store(target + d, load(acc + m * dim + d) * inverse + 0.0f);
    }
}

static void task_16(const Attention *a, int t, int h) { invariant_task(a, t, h, 16); }
static void task_32(const Attention *a, int t, int h) { invariant_task(a, t, h, 32); }
static void task_64(const Attention *a, int t, int h) { invariant_task(a, t, h, 64); }
static void task_128(const Attention *a, int t, int h) { invariant_task(a, t, h, 128); }
static void task_any(const Attention *a, int t, int h) { invariant_task(a, t, h, a->head_dim); }

/* Row t of a sequence, at position p, attends to the sequence's positions [max(0, p - window + 1), p]. */
void invariant_attention(const Attention *at) {
    void (*run)(const Attention *, int, int) = at->head_dim == 16    ? task_16
                                               : at->head_dim == 32  ? task_32
                                               : at->head_dim == 64  ? task_64
                                               : at->head_dim == 128 ? task_128
                                                                     : task_any;
    const int tasks = at->num_tasks * at->num_kv_heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(at->num_threads) if (at->num_threads > 1 && tasks > 1)
    for (int i = 0; i < tasks; i++) run(at, i / at->num_kv_heads, i % at->num_kv_heads);
}

/* -- log-probabilities */

/* NaN if any is: comparisons alone would lose it. */
static float largest(const float *x, int64_t n) {
    vec high = splat(-INFINITY);
    ivec is_nan = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec y = load(x + i);
        high = vmax(high, y);
        is_nan |= y != y;
    }
    float top = max1(high);
    int found = 0;
    for (; i < n; i++) {
        top = x[i] > top ? x[i] : top;
        found |= x[i] != x[i];
    }
    for (int lane = 0; lane < LANES; lane++) found |= is_nan[lane];
    return found ? NAN : top;
}

/* Of softmax(logits * inverse) at one target a row: logits [rows, vocab], inverse and targets [rows]; logprobs and
 * the logarithm of the normaliser [rows]. Sums of 64 terms in lanes, those in double, in the order of the words. */
void invariant_logprobs(const float *logits, int64_t row_stride, int64_t rows, int64_t vocab, const float *inverse,
                        const int64_t *targets, float *logprobs, float *normaliser, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && rows * vocab >= PARALLEL_FROM)
    for (int64_t r = 0; r < rows; r++) {
        const float *x = logits + r * row_stride, by = inverse[r], top = largest(x, vocab);
        double total = 0;
        for (int64_t v = 0; v < vocab; v += 64) {
            vec sum = splat(0);
            for (int64_t i = v; i < least(v + 64, vocab); i += LANES) {
                vec y = splat(-INFINITY);
                if (i + LANES <= vocab)
                    y = load(x + i);
                else
                    memcpy(&y, x + i, (vocab - i) * sizeof(float));
                sum += vexp((y - top) * by);
            }
            total += sum1(sum);
        }
        logprobs[r] = (float)((double)((x[targets[r]] - top) * by) - log(total));
        normaliser[r] = (float)((double)(top * by) + log(total));
    }
}
