/* Paged attention of one layer for one step, float32.
 *
 * All rows write their keys and values first; then each row at position p of its request attends to the request's
 * positions [max(0, p - window + 1), p]. The work is cut into tasks of (request, block of rows, key/value head): the
 * query heads that share a key/value head, and the rows of a block, use the same keys while they are in the cache.
 * Softmax is the usual running one over blocks of keys.
 */
#include "vector.h"

#define KEY_BLOCK 64
#define MAX_QUERIES 64 /* query vectors of a task: rows x heads of a group */
#define MAX_DIM 256
#define MASKED -1e30f
#define PREFETCH 8 /* keys ahead */

typedef struct {
    /* the step */
    const int64_t *row_slots;     /* [T] */
    const int64_t *row_positions; /* [T] */
    const int32_t *request_seats; /* [R] */
    const int32_t *cu_rows;       /* [R + 1] */
    const int32_t *slot_table;    /* [S, table_stride] */
    const int32_t *task_request;  /* [N]: request of each block of rows */
    const int32_t *task_row;      /* [N]: its first row */
    int64_t table_stride;
    int32_t num_rows, num_tasks, block_rows, num_threads;
    /* the layer's shape */
    int32_t num_heads, num_kv_heads, head_dim, reserved;
} Step;

typedef struct {
    float *keys, *values; /* pools [num_slots, Hkv, D] */
    const float *query, *key, *value;
    float *out; /* [T, Hq, D] */
    int64_t query_row, query_head, key_row, key_head, value_row, value_head; /* strides in floats */
    float scaling;
    int32_t window; /* 0: unbounded */
} Layer;

INLINE int least(int a, int b) { return a < b ? a : b; }

/* Dot products of `some` (1, 2 or 4) query vectors from m on with n keys; four at a time share one reduction. */
INLINE void scores(const float *q, float *score, int m, const int some, const float *keys, const float *values,
                   const int32_t *slots, int n, int64_t slot_size, const int dim, int is_first) {
    const int together = 4 / some;
    for (int s = 0; s < n; s += together) {
        const float *k[4];
        for (int i = 0; i < together; i++) k[i] = keys + slots[least(s + i, n - 1)] * slot_size;
        if (is_first)
            for (int i = 0; i < together; i++) {
                const float *next_key = keys + slots[least(s + i + PREFETCH, n - 1)] * slot_size;
                const float *value = values + slots[least(s + i, n - 1)] * slot_size;
                for (int d = 0; d < dim; d += LANES) {
                    __builtin_prefetch(next_key + d);
                    __builtin_prefetch(value + d);
                }
            }
        vec dot[4];
        for (int j = 0; j < 4; j++) dot[j] = load(q + (m + j % some) * dim) * load(k[j / some]);
        for (int d = LANES; d < dim; d += LANES)
            for (int j = 0; j < 4; j++) dot[j] += load(q + (m + j % some) * dim + d) * load(k[j / some] + d);
        vec4 sums = sum4(dot[0], dot[1], dot[2], dot[3]);
        for (int j = 0; j < 4; j++)
            if (s + j / some < n) score[(m + j % some) * KEY_BLOCK + s + j / some] = sums[j];
    }
}

/* Add n values, weighted, to the sums of `some` query vectors: some x 64 numbers of a head stay in registers. */
INLINE void weigh(float *acc, const float *score, int m, const int some, const float *values, const int32_t *slots,
                  int n, int64_t slot_size, const int dim) {
    const float *w = score + m * KEY_BLOCK;
    for (int d0 = 0; d0 < dim; d0 += 4 * LANES) {
        const int parts = least(4, (dim - d0) / LANES);
        vec sum[4][4];
        for (int j = 0; j < some; j++)
            for (int i = 0; i < parts; i++) sum[j][i] = load(acc + (m + j) * dim + d0 + i * LANES);
        for (int s = 0; s < n; s++) {
            const float *v = values + slots[s] * slot_size + d0;
            for (int i = 0; i < parts; i++) {
                vec x = load(v + i * LANES);
                for (int j = 0; j < some; j++) sum[j][i] += w[j * KEY_BLOCK + s] * x;
            }
        }
        for (int j = 0; j < some; j++)
            for (int i = 0; i < parts; i++) store(acc + (m + j) * dim + d0 + i * LANES, sum[j][i]);
    }
}

/* One task; `dim` is a compile-time constant in the instances below, a multiple of LANES. */
INLINE void attend_task(const Step *step, const Layer *layer, int task, int kv_head, const int dim) {
    const int group = step->num_heads / step->num_kv_heads;
    const int request = step->task_request[task], row0 = step->task_row[task];
    const int rows = least(step->block_rows, step->cu_rows[request + 1] - row0);
    const int queries = rows * group, padded = (queries + 3) & ~3;
    const int32_t *slots = step->slot_table + step->request_seats[request] * step->table_stride;
    const int64_t slot_size = (int64_t)step->num_kv_heads * dim;
    const float *keys = layer->keys + (int64_t)kv_head * dim, *values = layer->values + (int64_t)kv_head * dim;
    const int first = (int)step->row_positions[row0], last = first + rows - 1;
    const int from = layer->window > 0 && first - layer->window + 1 > 0 ? first - layer->window + 1 : 0;

    float q[MAX_QUERIES * MAX_DIM] __attribute__((aligned(64)));
    float acc[MAX_QUERIES * MAX_DIM] __attribute__((aligned(64)));
    float score[MAX_QUERIES * KEY_BLOCK] __attribute__((aligned(64)));
    float maximum[MAX_QUERIES], total[MAX_QUERIES];

    for (int m = 0; m < padded; m++) {
        const int at = least(m, queries - 1);
        const float *source = layer->query + (int64_t)(row0 + at / group) * layer->query_row +
                              (int64_t)(kv_head * group + at % group) * layer->query_head;
        for (int d = 0; d < dim; d += LANES) {
            store(q + m * dim + d, load(source + d) * layer->scaling);
            store(acc + m * dim + d, splat(0));
        }
        maximum[m] = MASKED;
        total[m] = 0;
    }

    for (int block = from; block <= last; block += KEY_BLOCK) {
        const int n = least(KEY_BLOCK, last + 1 - block), lanes = (n + LANES - 1) & ~(LANES - 1);
        int m = 0;
        for (; m + 4 <= queries; m += 4) scores(q, score, m, 4, keys, values, slots + block, n, slot_size, dim, m == 0);
        if (queries - m == 3) scores(q, score, m, 4, keys, values, slots + block, n, slot_size, dim, m == 0);
        if (queries - m == 2) scores(q, score, m, 2, keys, values, slots + block, n, slot_size, dim, m == 0);
        if (queries - m == 1) scores(q, score, m, 1, keys, values, slots + block, n, slot_size, dim, m == 0);
        /* running softmax */
        for (int m = 0; m < queries; m++) {
            const int position = first + m / group;
            float *row = score + m * KEY_BLOCK;
            const int until = least(n, position + 1 - block); /* keys that this row may see: [begin, until) */
            int begin = 0;
            if (layer->window > 0 && position - layer->window + 1 > block) begin = position - layer->window + 1 - block;
            for (int s = 0; s < least(begin, n); s++) row[s] = MASKED;
            for (int s = until < 0 ? 0 : until; s < lanes; s++) row[s] = MASKED;
            vec high = load(row);
            for (int s = LANES; s < lanes; s += LANES) high = vmax(high, load(row + s));
            float top = max1(high);
            if (top < maximum[m]) top = maximum[m];
            vec sum = splat(0);
            for (int s = 0; s < lanes; s += LANES) {
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
        for (m = 0; m + 4 <= queries; m += 4) weigh(acc, score, m, 4, values, slots + block, n, slot_size, dim);
        if (queries - m == 3) weigh(acc, score, m, 3, values, slots + block, n, slot_size, dim);
        if (queries - m == 2) weigh(acc, score, m, 2, values, slots + block, n, slot_size, dim);
        if (queries - m == 1) weigh(acc, score, m, 1, values, slots + block, n, slot_size, dim);
    }
    for (int m = 0; m < queries; m++) {
        float *target = layer->out + ((int64_t)(row0 + m / group) * step->num_heads + kv_head * group + m % group) * dim;
        const float inverse = 1.0f / total[m];
        for (int d = 0; d < dim; d += LANES) store(target + d, load(acc + m * dim + d) * inverse);
    }
}

static void attend_16(const Step *s, const Layer *l, int t, int h) { attend_task(s, l, t, h, 16); }
static void attend_32(const Step *s, const Layer *l, int t, int h) { attend_task(s, l, t, h, 32); }
static void attend_64(const Step *s, const Layer *l, int t, int h) { attend_task(s, l, t, h, 64); }
static void attend_128(const Step *s, const Layer *l, int t, int h) { attend_task(s, l, t, h, 128); }
static void attend_any(const Step *s, const Layer *l, int t, int h) { attend_task(s, l, t, h, s->head_dim); }

static void write_row(const Step *step, const Layer *layer, int row) {
    const int dim = step->head_dim;
    const int64_t at = step->row_slots[row] * step->num_kv_heads * dim;
    for (int h = 0; h < step->num_kv_heads; h++) {
        memcpy(layer->keys + at + h * dim, layer->key + row * layer->key_row + h * layer->key_head, sizeof(float) * dim);
        memcpy(layer->values + at + h * dim, layer->value + row * layer->value_row + h * layer->value_head,
               sizeof(float) * dim);
    }
}

void paged_attention(const Step *step, const Layer *layer) {
    void (*attend)(const Step *, const Layer *, int, int) = step->head_dim == 16    ? attend_16
                                                            : step->head_dim == 32  ? attend_32
                                                            : step->head_dim == 64  ? attend_64
                                                            : step->head_dim == 128 ? attend_128
                                                                                    : attend_any;
    const int tasks = step->num_tasks * step->num_kv_heads;
#pragma omp parallel num_threads(step->num_threads) if (step->num_threads > 1)
    {
#pragma omp for schedule(static)
        for (int row = 0; row < step->num_rows; row++) write_row(step, layer, row);
        /* the barrier here matters: rows attend to what others wrote */
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < tasks; i++) attend(step, layer, i / step->num_kv_heads, i % step->num_kv_heads);
    }
}
