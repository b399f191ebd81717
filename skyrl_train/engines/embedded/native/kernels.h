/* What the files here call of each other, and what Python fills in; each is explained where it is defined. */
#pragma once
#include <stdint.h>

/* attention.c */
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
    int32_t num_heads, num_kv_heads, head_dim, is_bfloat16;
} Step;

typedef struct {
    char *keys, *values; /* pools [num_slots, Hkv, D] */
    const char *query, *key, *value;
    char *out; /* [T, Hq, D] */
    int64_t query_row, query_head, key_row, key_head, value_row, value_head; /* strides in numbers */
    float scaling;
    int32_t window; /* 0: unbounded */
} Layer;

void paged_attention(const Step *step, const Layer *layer);

/* packed_linear.c */
typedef struct {
    const char *x; /* [M, K], rows `x_row` elements apart */
    const char *packed;
    const void *bias; /* [N], or null; not for a gated pair */
    char *out;        /* [M, N], contiguous */
    int64_t x_row, num_rows, n, k; /* n: columns of out */
    int32_t is_bfloat16, is_gated, num_threads, reserved;
} Product;

void packed_product(const Product *p);

/* elementwise.c */
typedef struct {
    const void *x;                   /* [T, heads, dim] with strides in numbers */
    int64_t row_stride, head_stride;
    void *out;                       /* [T, heads, dim] */
    int64_t heads;
} Rotated;

void rms_norm(const void *x, const void *weight, void *out, int64_t rows, int64_t dim, float eps, float offset,
              int32_t is_bfloat16, int32_t num_threads);
void rotate(const Rotated *parts, int64_t num_parts, int64_t rows, int64_t dim, const void *cosine, const void *sine,
            int32_t is_bfloat16, int32_t num_threads);
void silu_times(void *gate, const void *up, int64_t n, int32_t is_bfloat16, int32_t num_threads);
