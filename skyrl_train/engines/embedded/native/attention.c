/* Paged attention of one layer for one step; float32 or bfloat16, computed in float32.
 *
 * All rows write their keys and values first; then each row at position p of its request attends to the request's
 * positions [max(0, p - window + 1), p]. The work is cut into tasks of (request, block of rows, key/value head): the
 * query heads that share a key/value head, and the rows of a block, use the same keys while they are in the cache.
 * Softmax is the usual running one over blocks of keys.
 */
#include "bfloat16.h"
#include "kernels.h"

#define KEY_BLOCK 64
#define MAX_QUERIES 64 /* query vectors of a task: rows x heads of a group */
#define MAX_DIM 256
#define MASKED -1e30f
#define PREFETCH 8 /* keys ahead */

INLINE int size_of(const int is_bfloat16) { return is_bfloat16 ? 2 : 4; }

INLINE int least(int a, int b) { return a < b ? a : b; }

/* Dot products of `some` (1, 2 or 4) query vectors from m on with n keys; four at a time share one reduction. */
INLINE void scores(const float *q, float *score, int m, const int some, const char *keys, const char *values,
                   const int32_t *slots, int n, int64_t slot_bytes, const int dim, int is_first, const int half) {
    const int together = 4 / some;
    for (int s = 0; s < n; s += together) {
        const char *k[4];
        for (int i = 0; i < together; i++) k[i] = keys + slots[least(s + i, n - 1)] * slot_bytes;
        if (is_first)
            for (int i = 0; i < together; i++) {
                const char *next_key = keys + slots[least(s + i + PREFETCH, n - 1)] * slot_bytes;
                const char *value = values + slots[least(s + i, n - 1)] * slot_bytes;
                for (int at = 0; at < dim * size_of(half); at += 64) {
                    __builtin_prefetch(next_key + at);
                    __builtin_prefetch(value + at);
                }
            }
        vec dot[4];
        for (int j = 0; j < 4; j++) dot[j] = load(q + (m + j % some) * dim) * get(k[j / some], 0, half);
        for (int d = LANES; d < dim; d += LANES)
            for (int j = 0; j < 4; j++) dot[j] += load(q + (m + j % some) * dim + d) * get(k[j / some], d, half);
        vec4 sums = sum4(dot[0], dot[1], dot[2], dot[3]);
        for (int j = 0; j < 4; j++)
            if (s + j / some < n) score[(m + j % some) * KEY_BLOCK + s + j / some] = sums[j];
    }
}

/* Add n values, weighted, to the sums of `some` query vectors: some x 64 numbers of a head stay in registers. */
INLINE void weigh(float *acc, const float *score, int m, const int some, const char *values, const int32_t *slots,
                  int n, int64_t slot_bytes, const int dim, const int half) {
    const float *w = score + m * KEY_BLOCK;
    for (int d0 = 0; d0 < dim; d0 += 4 * LANES) {
        const int parts = least(4, (dim - d0) / LANES);
        vec sum[4][4];
        for (int j = 0; j < some; j++)
            for (int i = 0; i < parts; i++) sum[j][i] = load(acc + (m + j) * dim + d0 + i * LANES);
        for (int s = 0; s < n; s++) {
            const char *v = values + slots[s] * slot_bytes;
            for (int i = 0; i < parts; i++) {
                vec x = get(v, d0 + i * LANES, half);
                for (int j = 0; j < some; j++) sum[j][i] += w[j * KEY_BLOCK + s] * x;
            }
        }
        for (int j = 0; j < some; j++)
            for (int i = 0; i < parts; i++) store(acc + (m + j) * dim + d0 + i * LANES, sum[j][i]);
    }
}

/* One task; `dim` is a compile-time constant in the instances below, a multiple of LANES. */
INLINE void attend_task(const Step *step, const Layer *layer, int task, int kv_head, const int dim, const int half) {
    const int group = step->num_heads / step->num_kv_heads;
    const int request = step->task_request[task], row0 = step->task_row[task];
    const int rows = least(step->block_rows, step->cu_rows[request + 1] - row0);
    const int queries = rows * group, padded = (queries + 3) & ~3;
    const int32_t *slots = step->slot_table + step->request_seats[request] * step->table_stride;
    const int64_t head_bytes = (int64_t)dim * size_of(half), slot_bytes = step->num_kv_heads * head_bytes;
    const char *keys = layer->keys + kv_head * head_bytes, *values = layer->values + kv_head * head_bytes;
    const int first = (int)step->row_positions[row0], last = first + rows - 1;
    const int from = layer->window > 0 && first - layer->window + 1 > 0 ? first - layer->window + 1 : 0;

    float q[MAX_QUERIES * MAX_DIM] __attribute__((aligned(64)));
    float acc[MAX_QUERIES * MAX_DIM] __attribute__((aligned(64)));
    float score[MAX_QUERIES * KEY_BLOCK] __attribute__((aligned(64)));
    float maximum[MAX_QUERIES], total[MAX_QUERIES];

    for (int m = 0; m < padded; m++) {
        const int at = least(m, queries - 1);
        const int64_t source = (int64_t)(row0 + at / group) * layer->query_row +
                               (int64_t)(kv_head * group + at % group) * layer->query_head;
        for (int d = 0; d < dim; d += LANES) {
            store(q + m * dim + d, get(layer->query, source + d, half) * layer->scaling);
            store(acc + m * dim + d, splat(0));
        }
        maximum[m] = MASKED;
        total[m] = 0;
    }

    for (int block = from; block <= last; block += KEY_BLOCK) {
        const int n = least(KEY_BLOCK, last + 1 - block), lanes = (n + LANES - 1) & ~(LANES - 1);
        int m = 0;
        for (; m + 4 <= queries; m += 4) scores(q, score, m, 4, keys, values, slots + block, n, slot_bytes, dim, m == 0, half);
        if (queries - m == 3) scores(q, score, m, 4, keys, values, slots + block, n, slot_bytes, dim, m == 0, half);
        if (queries - m == 2) scores(q, score, m, 2, keys, values, slots + block, n, slot_bytes, dim, m == 0, half);
        if (queries - m == 1) scores(q, score, m, 1, keys, values, slots + block, n, slot_bytes, dim, m == 0, half);
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
        for (m = 0; m + 4 <= queries; m += 4) weigh(acc, score, m, 4, values, slots + block, n, slot_bytes, dim, half);
        if (queries - m == 3) weigh(acc, score, m, 3, values, slots + block, n, slot_bytes, dim, half);
        if (queries - m == 2) weigh(acc, score, m, 2, values, slots + block, n, slot_bytes, dim, half);
        if (queries - m == 1) weigh(acc, score, m, 1, values, slots + block, n, slot_bytes, dim, half);
    }
    for (int m = 0; m < queries; m++) {
        const int64_t target = ((int64_t)(row0 + m / group) * step->num_heads + kv_head * group + m % group) * dim;
        const float inverse = 1.0f / total[m];
        for (int d = 0; d < dim; d += LANES) set(layer->out, target + d, load(acc + m * dim + d) * inverse, half);
    }
}

typedef void (*Attend)(const Step *, const Layer *, int, int);
#define DEFINE(dim, number)                                                                                           \
    static void float32_##dim(const Step *s, const Layer *l, int t, int h) { attend_task(s, l, t, h, number, 0); }    \
    static void bfloat16_##dim(const Step *s, const Layer *l, int t, int h) { attend_task(s, l, t, h, number, 1); }
DEFINE(16, 16) DEFINE(32, 32) DEFINE(64, 64) DEFINE(128, 128) DEFINE(any, s->head_dim)

static Attend attend_of(const Step *step) {
    switch (step->head_dim) {
        case 16: return step->is_bfloat16 ? bfloat16_16 : float32_16;
        case 32: return step->is_bfloat16 ? bfloat16_32 : float32_32;
        case 64: return step->is_bfloat16 ? bfloat16_64 : float32_64;
        case 128: return step->is_bfloat16 ? bfloat16_128 : float32_128;
        default: return step->is_bfloat16 ? bfloat16_any : float32_any;
    }
}

static void write_row(const Step *step, const Layer *layer, int row) {
    const int64_t size = size_of(step->is_bfloat16), head = step->head_dim * size;
    const int64_t at = step->row_slots[row] * step->num_kv_heads * head;
    for (int h = 0; h < step->num_kv_heads; h++) {
        memcpy(layer->keys + at + h * head, layer->key + (row * layer->key_row + h * layer->key_head) * size, head);
        memcpy(layer->values + at + h * head, layer->value + (row * layer->value_row + h * layer->value_head) * size, head);
    }
}

void paged_attention(const Step *step, const Layer *layer) {
    const Attend attend = attend_of(step);
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
