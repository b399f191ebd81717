/* x @ w^T + bias with a packed copy of w; float32, or bfloat16 with sums in float32.
 *
 * Packed float32:   [ceil(N / 32)][K][32]          32 rows of w side by side, a column at a time
 * Packed bfloat16:  [ceil(N / 32)][ceil(K / 2)][32][2]   the same, two columns at a time
 *
 * Rows of w past N, and a column past K, are zeros. A tile of up to MAX_ROWS rows of x and one to four panels of w keeps
 * its sums in registers over the whole of K: each number is summed in the order of K, whatever the number of rows.
 *
 * A gated pair (SwiGLU) is packed as one matrix whose panels are 16 rows of the gate and 16 of the other: a tile then
 * has both halves of its numbers and stores silu(gate) * up.
 */
#include "bfloat16.h"
#include "kernels.h"

#define PANEL 32
#define VECS 2 /* of a panel */
#ifdef __AVX512F__
#define MAX_ROWS 12 /* 24 sums in 32 registers */
#else
#define MAX_ROWS 3
#endif
#define MAX_PANELS 4
#define CHUNK_FLOATS (1 << 18)     /* of x, to be read again for each panel: about a core's own cache */
#define PARALLEL_FROM (1 << 18)    /* multiplications: below, waking the other threads costs more than it saves */

INLINE int64_t least64(int64_t a, int64_t b) { return a < b ? a : b; }

/* row n of the packed matrix -> row of w, or -1; `up` is the second matrix of a gated pair, or null */
INLINE const char *row_of(const char *w, const char *up, int64_t n, int64_t num_rows, int64_t stride) {
    if (up) {
        const int64_t at = n / PANEL * LANES + n % LANES;
        if (at >= num_rows) return 0;
        return (n % PANEL < LANES ? w : up) + at * stride;
    }
    return n < num_rows ? w + n * stride : 0;
}

/* w and up [N, K] with a row stride in elements; `up` null but for a gated pair */
void pack_float32(const float *w, const float *up, int64_t num_rows, int64_t k, int64_t stride, float *packed,
                  int32_t num_threads) {
    const int64_t panels = ((up ? 2 : 1) * num_rows + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t p = 0; p < panels; p++)
        for (int j = 0; j < PANEL; j++) {
            const float *row = (const float *)row_of((const char *)w, (const char *)up, p * PANEL + j, num_rows, stride * 4);
            float *to = packed + p * k * PANEL + j;
            for (int64_t i = 0; i < k; i++) to[i * PANEL] = row ? row[i] : 0.0f;
        }
}

void pack_bfloat16(const uint16_t *w, const uint16_t *up, int64_t num_rows, int64_t k, int64_t stride, uint16_t *packed,
                   int32_t num_threads) {
    const int64_t panels = ((up ? 2 : 1) * num_rows + PANEL - 1) / PANEL, pairs = (k + 1) / 2;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t p = 0; p < panels; p++)
        for (int j = 0; j < PANEL; j++) {
            const uint16_t *row =
                (const uint16_t *)row_of((const char *)w, (const char *)up, p * PANEL + j, num_rows, stride * 2);
            uint16_t *to = packed + p * pairs * 2 * PANEL + 2 * j;
            for (int64_t i = 0; i < 2 * pairs; i++) to[i / 2 * 2 * PANEL + i % 2] = row && i < k ? row[i] : 0;
        }
}

/* Columns [column, column + PANEL) of `rows` rows from `row` on; a gated panel is half as many columns. */
static __attribute__((noinline)) void put(const Product *p, const vec *sums, int64_t row, int rows, int64_t column) {
    for (int r = 0; r < rows; r++) {
        vec a = sums[2 * r], b = sums[2 * r + 1];
        int64_t width = PANEL;
        if (p->is_gated) {
            a = silu(a) * b;
            width = LANES;
        } else if (p->bias) {
            if (column + PANEL <= p->n) {
                a += p->is_bfloat16 ? load_bf16((const uint16_t *)p->bias + column) : load((const float *)p->bias + column);
                b += p->is_bfloat16 ? load_bf16((const uint16_t *)p->bias + column + LANES)
                                    : load((const float *)p->bias + column + LANES);
            } else {
                for (int i = 0; i < PANEL && column + i < p->n; i++) {
                    const float one = p->is_bfloat16 ? float_of_bf16(((const uint16_t *)p->bias)[column + i])
                                                     : ((const float *)p->bias)[column + i];
                    if (i < LANES) a[i] += one; else b[i - LANES] += one;
                }
            }
        }
        const int64_t at = (row + r) * p->n + column, left = p->n - column;
        if (p->is_bfloat16) {
            uint16_t *to = (uint16_t *)p->out + at;
            if (left >= width) {
                store_bf16(to, a);
                if (width == PANEL) store_bf16(to + LANES, b);
            } else {
                uint16_t both[PANEL];
                store_bf16(both, a);
                store_bf16(both + LANES, b);
                memcpy(to, both, sizeof(uint16_t) * left);
            }
        } else {
            float *to = (float *)p->out + at;
            if (left >= width) {
                store(to, a);
                if (width == PANEL) store(to + LANES, b);
            } else {
                float both[PANEL];
                store(both, a);
                store(both + LANES, b);
                memcpy(to, both, sizeof(float) * left);
            }
        }
    }
}

INLINE void tile_float32(const Product *p, int64_t row, const int rows, int64_t panel, const int panels) {
    const float *x[MAX_ROWS];
    for (int r = 0; r < rows; r++) x[r] = (const float *)p->x + (row + r) * p->x_row;
    const float *w = (const float *)p->packed + panel * p->k * PANEL;
    const int64_t next = p->k * PANEL, k = p->k;
    vec sums[MAX_PANELS][MAX_ROWS][VECS];
    for (int q = 0; q < panels; q++)
        for (int r = 0; r < rows; r++) sums[q][r][0] = sums[q][r][1] = splat(0);
    for (int64_t i = 0; i < k; i++)
        for (int q = 0; q < panels; q++) {
            vec a = load(w + q * next + i * PANEL), b = load(w + q * next + i * PANEL + LANES);
            for (int r = 0; r < rows; r++) {
                vec one = splat(x[r][i]);
                sums[q][r][0] += one * a;
                sums[q][r][1] += one * b;
            }
        }
    const int64_t width = p->is_gated ? LANES : PANEL;
    for (int q = 0; q < panels; q++) {
        vec kept[MAX_ROWS * VECS]; /* what put sees has an address, and would not stay in registers above */
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECS; v++) kept[VECS * r + v] = sums[q][r][v];
        put(p, kept, row, rows, (panel + q) * width);
    }
}

INLINE void tile_bfloat16(const Product *p, int64_t row, const int rows, int64_t panel, const int panels) {
    const uint16_t *x[MAX_ROWS];
    for (int r = 0; r < rows; r++) x[r] = (const uint16_t *)p->x + (row + r) * p->x_row;
    const int64_t pairs = (p->k + 1) / 2, whole = p->k / 2, next = pairs * 2 * PANEL;
    const uint16_t *w = (const uint16_t *)p->packed + panel * next;
    vec sums[MAX_PANELS][MAX_ROWS][VECS];
    for (int q = 0; q < panels; q++)
        for (int r = 0; r < rows; r++) sums[q][r][0] = sums[q][r][1] = splat(0);
    for (int64_t i = 0; i < whole; i++)
        for (int q = 0; q < panels; q++) {
            ivec a = load_pairs(w + q * next + i * 2 * PANEL), b = load_pairs(w + q * next + i * 2 * PANEL + 2 * LANES);
            for (int r = 0; r < rows; r++) {
                int32_t both;
                memcpy(&both, x[r] + 2 * i, sizeof both);
                sums[q][r][0] = dot_pairs(sums[q][r][0], both, a);
                sums[q][r][1] = dot_pairs(sums[q][r][1], both, b);
            }
        }
    if (pairs > whole)
        for (int q = 0; q < panels; q++)
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < VECS; v++)
                    sums[q][r][v] =
                        dot_pairs(sums[q][r][v], x[r][2 * whole], load_pairs(w + q * next + (whole * PANEL + v * LANES) * 2));
    const int64_t width = p->is_gated ? LANES : PANEL;
    for (int q = 0; q < panels; q++) {
        vec kept[MAX_ROWS * VECS]; /* what put sees has an address, and would not stay in registers above */
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECS; v++) kept[VECS * r + v] = sums[q][r][v];
        put(p, kept, row, rows, (panel + q) * width);
    }
}

/* Few rows take several panels at once, so that there are sums enough to wait for. */
#define TILE(rows, panels)                                                                      \
    if (p->is_bfloat16) tile_bfloat16(p, row, rows, panel, panels); else tile_float32(p, row, rows, panel, panels); \
    return

static void tile_1(const Product *p, int64_t row, int64_t panel) { TILE(1, 1); }
#define DEFINE(rows, panels) \
    static void tile_##rows##_##panels(const Product *p, int64_t row, int64_t panel) { TILE(rows, panels); }
DEFINE(1, 4) DEFINE(2, 1) DEFINE(3, 1)
#ifdef __AVX512F__
DEFINE(2, 4) DEFINE(3, 2) DEFINE(4, 2) DEFINE(5, 2) DEFINE(6, 2)
DEFINE(4, 1) DEFINE(5, 1) DEFINE(6, 1) DEFINE(7, 1) DEFINE(8, 1) DEFINE(9, 1) DEFINE(10, 1) DEFINE(11, 1) DEFINE(12, 1)
#endif

typedef void (*Tile)(const Product *, int64_t, int64_t);
static const Tile single[MAX_ROWS + 1] = {
    0, tile_1, tile_2_1, tile_3_1,
#ifdef __AVX512F__
    tile_4_1, tile_5_1, tile_6_1, tile_7_1, tile_8_1, tile_9_1, tile_10_1, tile_11_1, tile_12_1,
#endif
};
/* of several panels, and how many; 0: there is none */
static const Tile several[MAX_ROWS + 1] = {
    0, tile_1_4,
#ifdef __AVX512F__
    tile_2_4, tile_3_2, tile_4_2, tile_5_2, tile_6_2,
#endif
};
static const int num_several[MAX_ROWS + 1] = {
    1, 4,
#ifdef __AVX512F__
    4, 2, 2, 2, 2,
#endif
};

void packed_product(const Product *p) {
    const int64_t width = p->is_gated ? LANES : PANEL, panels = (p->n + width - 1) / width;
    int64_t chunk = CHUNK_FLOATS / (p->k > 0 ? p->k : 1);
    chunk = chunk < 96 ? 96 : chunk;
    const int64_t unit = least64(MAX_PANELS, (panels + p->num_threads - 1) / p->num_threads);
    const int64_t units = (panels + unit - 1) / unit;
    for (int64_t begin = 0; begin < p->num_rows; begin += chunk) {
        const int64_t some = least64(chunk, p->num_rows - begin), blocks = (some + MAX_ROWS - 1) / MAX_ROWS;
        const int64_t least_rows = some / blocks, longer = some % blocks;
#pragma omp parallel for schedule(static) num_threads(p->num_threads) \
    if (p->num_threads > 1 && some * p->n * p->k >= PARALLEL_FROM)
        for (int64_t u = 0; u < units; u++) {
            const int64_t end = least64((u + 1) * unit, panels);
            int64_t panel = u * unit;
            while (panel < end) {
                int64_t step = 1, row = begin;
                for (int64_t b = 0; b < blocks; b++) {
                    const int64_t rows = least_rows + (b < longer);
                    /* all blocks go over the same panels: those that take fewer at once go over them one by one */
                    if (b == 0) step = num_several[rows] > 1 && panel + num_several[rows] <= end ? num_several[rows] : 1;
                    if (step > 1 && num_several[rows] == step)
                        several[rows](p, row, panel);
                    else
                        for (int64_t q = 0; q < step; q++) single[rows](p, row, panel + q);
                    row += rows;
                }
                panel += step;
            }
        }
    }
}
