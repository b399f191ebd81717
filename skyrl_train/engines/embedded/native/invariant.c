/* Operations whose result for a row depends on that row and the weights alone; float32.
 *
 * Alone or in any batch, in any chunk, on any number of threads, a row goes through the same additions in the same
 * order:
 *   - a linear map adds in the order of its inputs; other sums over a row's numbers run in 16 lanes, in the order of
 *     the numbers, and the lanes are added in one order;
 *   - blocks (of rows, of outputs, of queries) only decide which rows are computed side by side, each in lanes or
 *     registers of its own; blocks of keys lie on one grid, that of positions, whoever asks;
 *   - threads split rows and outputs, never a sum;
 *   - this file is compiled with -ffp-contract=off, and fused multiply-adds are written out (`fma16`), so that no two
 *     copies of one expression can be rounded differently.
 * No loop here may sum over what belongs to several rows.
 */
#include <math.h>
#include <stdlib.h>

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

/* A panel is 32 rows of the weights side by side, a column at a time: a lane holds one output, and each output is summed in the order of the inputs, whatever is computed beside it. */
#define PANEL 32
#define PANELS 4 /* of a task */
#ifdef __AVX512F__
#define MAX_ROWS 12 /* 24 sums in 32 registers */
#else
#define MAX_ROWS 3
#endif
#define ROW_BLOCK 480 /* rows of a task */

/* Outputs [first, first + panels * PANEL) of `rows` rows; both constants. Panels lie `next` floats apart. */
INLINE void linear_tile(const float *x, int64_t depth, const float *panel, int64_t next, const float *bias, float *out,
                        int64_t outputs, int64_t first, const int rows, const int panels) {
    vec sum[PANELS][MAX_ROWS][2];
    for (int p = 0; p < panels; p++)
        for (int r = 0; r < rows; r++) sum[p][r][0] = sum[p][r][1] = splat(0);
    for (int64_t k = 0; k < depth; k++)
        for (int p = 0; p < panels; p++) {
            const vec a = load(panel + p * next + k * PANEL), b = load(panel + p * next + k * PANEL + LANES);
            for (int r = 0; r < rows; r++) {
                const vec one = splat(x[r * depth + k]);
                sum[p][r][0] = fma16(one, a, sum[p][r][0]);
                sum[p][r][1] = fma16(one, b, sum[p][r][1]);
            }
        }
    for (int p = 0; p < panels; p++)
        for (int v = 0; v < 2; v++) {
            const int64_t at = first + p * PANEL + v * LANES, left = outputs - at;
            if (left <= 0) continue;
            const int64_t n = least(left, LANES);
            const vec more = bias ? load_first(bias + at, n) : splat(0);
            for (int r = 0; r < rows; r++) {
                const vec total = bias ? sum[p][r][v] + more : sum[p][r][v];
                if (n == LANES)
                    store(out + r * outputs + at, total);
                else
                    store_first(out + r * outputs + at, total, n);
            }
        }
}

typedef void (*LinearTile)(const float *, int64_t, const float *, int64_t, const float *, float *, int64_t, int64_t);
#define DEFINE_TILE(rows, panels)                                                                                      \
    static void tile_##rows##x##panels(const float *x, int64_t depth, const float *panel, int64_t next,                \
                                       const float *bias, float *out, int64_t outputs, int64_t first) {                \
        linear_tile(x, depth, panel, next, bias, out, outputs, first, rows, panels);                                   \
    }
DEFINE_TILE(1, 1) DEFINE_TILE(2, 1) DEFINE_TILE(3, 1) DEFINE_TILE(1, 4)
#ifdef __AVX512F__
DEFINE_TILE(2, 4) DEFINE_TILE(3, 2) DEFINE_TILE(4, 2) DEFINE_TILE(5, 2) DEFINE_TILE(6, 2)
DEFINE_TILE(4, 1) DEFINE_TILE(5, 1) DEFINE_TILE(6, 1) DEFINE_TILE(7, 1) DEFINE_TILE(8, 1)
DEFINE_TILE(9, 1) DEFINE_TILE(10, 1) DEFINE_TILE(11, 1) DEFINE_TILE(12, 1)
#endif
static const LinearTile one_panel[MAX_ROWS + 1] = {
    0, tile_1x1, tile_2x1, tile_3x1,
#ifdef __AVX512F__
    tile_4x1, tile_5x1, tile_6x1, tile_7x1, tile_8x1, tile_9x1, tile_10x1, tile_11x1, tile_12x1,
#endif
};
/* Few rows take several panels at once, so that there are sums enough to wait for. */
static const struct { LinearTile tile; int panels; } several[MAX_ROWS + 1] = {
    [1] = {tile_1x4, 4},
#ifdef __AVX512F__
    [2] = {tile_2x4, 4}, [3] = {tile_3x2, 2}, [4] = {tile_4x2, 2}, [5] = {tile_5x2, 2}, [6] = {tile_6x2, 2},
#endif
};

/* Sixteen vectors as rows of a matrix, transposed in place by swapping ever smaller blocks. */
INLINE void transpose(vec x[LANES]) {
    for (int size = LANES / 2; size; size /= 2) {
        ivec low, high;
        for (int l = 0; l < LANES; l++) {
            low[l] = l & size ? LANES + l - size : l;
            high[l] = l & size ? LANES + l : l + size;
        }
        for (int i = 0; i < LANES; i++) {
            if (i & size) continue;
            const vec a = x[i], b = x[i + size];
            x[i] = __builtin_shuffle(a, b, low);
            x[i + size] = __builtin_shuffle(a, b, high);
        }
    }
}

/* One panel of weight [outputs, depth], outputs from `first` on; those past the end are zeros. */
static void pack_panel(const float *weight, int64_t outputs, int64_t depth, int64_t first, float *panel) {
    for (int64_t k = 0; k < depth; k += LANES) {
        const int64_t n = least(depth - k, LANES);
        for (int half = 0; half < PANEL; half += LANES) {
            vec part[LANES];
            for (int j = 0; j < LANES; j++) {
                const float *row = weight + (first + half + j) * depth + k;
                part[j] = first + half + j >= outputs ? splat(0) : n == LANES ? load(row) : load_first(row, n);
            }
            transpose(part);
            for (int j = 0; j < n; j++) store(panel + (k + j) * PANEL + half, part[j]);
        }
    }
}

/* All panels of weight [outputs, depth], one after the other. */
void invariant_pack(const float *weight, int64_t outputs, int64_t depth, float *packed, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t first = 0; first < outputs; first += PANEL)
        pack_panel(weight, outputs, depth, first, packed + first * depth);
}

/* out = x weight' + bias: x [rows, depth], weight [outputs, depth], bias [outputs] or 0, out [rows, outputs].
 * `packed`: what invariant_pack makes of the weights, or 0; then each task packs its own. */
void invariant_linear(const float *x, const float *weight, const float *packed, const float *bias, float *out,
                      int64_t rows, int64_t outputs, int64_t depth, int32_t num_threads) {
    const int64_t panels = (outputs + PANEL - 1) / PANEL, groups = (panels + PANELS - 1) / PANELS;
    const int64_t row_blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK, next = depth * PANEL;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && rows * outputs * depth >= 8 * PARALLEL_FROM)
    {
        float *own = packed ? 0 : malloc(sizeof(float) * PANELS * next);
#pragma omp for collapse(2) schedule(static)
        for (int64_t group = 0; group < groups; group++)
            for (int64_t row_block = 0; row_block < row_blocks; row_block++) {
                const int64_t begin = group * PANELS, end = least(begin + PANELS, panels);
                const float *from = packed ? packed + begin * next : own;
                if (!packed)
                    for (int64_t p = begin; p < end; p++)
                        pack_panel(weight, outputs, depth, p * PANEL, own + (p - begin) * next);
                const int64_t m_end = least((row_block + 1) * ROW_BLOCK, rows);
                for (int64_t p = begin; p < end;) {
                    const int64_t first = p * PANEL, few = rows <= MAX_ROWS ? rows : 0;
                    const float *panel = from + (p - begin) * next;
                    if (several[few].tile && p + several[few].panels <= end) {
                        several[few].tile(x, depth, panel, next, bias, out, outputs, first);
                        p += several[few].panels;
                        continue;
                    }
                    for (int64_t m = row_block * ROW_BLOCK; m < m_end; m += MAX_ROWS)
                        one_panel[least(MAX_ROWS, m_end - m)](x + m * depth, depth, panel, next, bias, out + m * outputs,
                                                              outputs, first);
                    p++;
                }
            }
        free(own);
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

/* GELU by its tanh: x / 2 * (1 + tanh(u)) = x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3) */
INLINE vec gelu_tanh(vec x) {
    const vec u = 1.5957691216057308f * (x + 0.044715f * x * x * x);
    ivec negative = u < splat(0);
    vec e = vexp(choose(negative, u, -u));
    return x * (choose(negative, e, splat(1.0f)) / (e + 1.0f));
}

INLINE vec activation(vec x, const int is_gelu) { return is_gelu ? gelu_tanh(x) : silu(x); }

/* out = silu(x) or gelu(x), n numbers */
void invariant_activation(const float *x, float *out, int64_t n, int32_t is_gelu, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && n >= PARALLEL_FROM)
    for (int64_t i = 0; i < n; i += LANES) {
        if (i + LANES <= n)
            store(out + i, activation(load(x + i), is_gelu));
        else
            store_first(out + i, activation(load_first(x + i, n - i), is_gelu), n - i);
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

#define PREFETCH 8 /* keys ahead */

/* Dot products of `some` (1, 2 or 4) query vectors from m on with n keys; 4 / some keys share one reduction. */
INLINE void invariant_scores(const Attention *at, const float *q, float *score, int m, const int some,
                             const float *keys, const float *values, const int32_t *slots, int n, const int dim) {
    const int together = 4 / some;
    for (int s = 0; s < n; s += together) {
        const float *k[4];
        for (int i = 0; i < together; i++) k[i] = keys + slots[least(s + i, n - 1)] * at->key_slot;
        if (m == 0)
            for (int i = 0; i < together; i++) {
                const float *next = keys + slots[least(s + i + PREFETCH, n - 1)] * at->key_slot;
                const float *value = values + slots[least(s + i, n - 1)] * at->value_slot;
                for (int d = 0; d < dim; d += LANES) {
                    __builtin_prefetch(next + d);
                    __builtin_prefetch(value + d);
                }
            }
        vec dot[4];
        for (int j = 0; j < 4; j++) dot[j] = splat(0);
        for (int d = 0; d < dim; d += LANES)
            for (int j = 0; j < 4; j++)
                dot[j] = fma16(load(q + (m + j % some) * dim + d), load(k[j / some] + d), dot[j]);
        vec4 sums = sum4(dot[0], dot[1], dot[2], dot[3]); /* each of the four by the same additions */
        for (int j = 0; j < 4; j++)
            if (s + j / some < n) score[(m + j % some) * KEY_BLOCK + s + j / some] = sums[j];
    }
}

/* Add n values, weighted, to the sums of `some` query vectors. */
INLINE void invariant_weigh(const Attention *at, float *acc, const float *score, int m, const int some,
                            const float *values, const int32_t *slots, int n, const int dim) {
    for (int d0 = 0; d0 < dim; d0 += 4 * LANES) {
        const int parts = (int)least(4, (dim - d0) / LANES);
        vec sum[4][4];
        for (int j = 0; j < some; j++)
            for (int i = 0; i < parts; i++) sum[j][i] = load(acc + (m + j) * dim + d0 + i * LANES);
        for (int s = 0; s < n; s++) {
            const float *value = values + slots[s] * at->value_slot + d0;
            for (int i = 0; i < parts; i++) {
                const vec x = load(value + i * LANES);
                for (int j = 0; j < some; j++)
                    sum[j][i] = fma16(splat(score[(m + j) * KEY_BLOCK + s]), x, sum[j][i]);
            }
        }
        for (int j = 0; j < some; j++)
            for (int i = 0; i < parts; i++) store(acc + (m + j) * dim + d0 + i * LANES, sum[j][i]);
    }
}

/* Rows of one sequence against its keys, under one key/value head. What a row may not see gets the weight 0, which adds
 * nothing to its sums: which rows share a task, and how far the others look, is without effect. */
INLINE void invariant_task(const Attention *at, int task, int kv_head, const int dim) {
    const int group = at->num_heads / at->num_kv_heads;
    const int sequence = at->task_sequence[task], row0 = at->task_row[task];
    const int rows = (int)least(at->block_rows, at->cu_rows[sequence + 1] - row0);
    const int queries = rows * group, padded = queries % 4 == 3 ? queries + 1 : queries; /* fours, then 2 or 1 */
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
        int m = 0;
        for (; m + 4 <= padded; m += 4) invariant_scores(at, q, score, m, 4, keys, values, slots + block, n, dim);
        if (padded - m == 2) invariant_scores(at, q, score, m, 2, keys, values, slots + block, n, dim);
        if (padded - m == 1) invariant_scores(at, q, score, m, 1, keys, values, slots + block, n, dim);
        for (m = 0; m < padded; m++) {
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
        for (m = 0; m + 4 <= padded; m += 4) invariant_weigh(at, acc, score, m, 4, values, slots + block, n, dim);
        if (padded - m == 2) invariant_weigh(at, acc, score, m, 2, values, slots + block, n, dim);
        if (padded - m == 1) invariant_weigh(at, acc, score, m, 1, values, slots + block, n, dim);
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
