/* All layers of a common decoder for one step, in one call: what the other files compute, without Python between.
 *
 *   residual [T, H] --norm-- q, k, v --head norms-- rotate -- attend -- o --+-- norm -- silu(gate) * up -- down --+--
 *        `----------------------------------------------------------------´ `-----------------------------------´
 *
 * float32 or bfloat16, as the weights are; each buffer is rounded as the modules' results would be.
 */
#include "bfloat16.h"
#include "kernels.h"

#define PARALLEL_FROM 32768 /* numbers: below, waking the other threads costs more than it saves */

typedef struct {
    const void *input_norm, *mlp_norm, *query_norm, *key_norm; /* weights; the last two null without norms of heads */
    float input_eps, mlp_eps, query_eps, key_eps;
    float scaling;
    int32_t window;
    char *keys, *values; /* pools */
    const Product *query, *key, *value, *output, *gated, *down;
    const Product *gate, *up; /* the halves of `gated`, for steps with `changed` */
} DecoderLayer;

enum { QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN };

typedef struct {
    const DecoderLayer *layers;
    const Step *step;
    const void *cosine, *sine; /* [T, D] */
    char *residual;            /* [T, H]: embeddings in, the last layer's sum out */
    char *normed, *added;      /* [T, H] */
    char *q, *k, *v, *attended, *gated, *up;
    void (*changed)(int32_t layer, int32_t map); /* called after each product, may change its result; or null */
    int64_t num_rows, hidden;
    int32_t num_layers, num_threads;
} DecoderStep;

static void multiply(const Product *product, const char *x, char *out, const DecoderStep *d) {
    Product p = *product;
    p.x = x;
    p.out = out;
    p.num_rows = d->num_rows;
    p.num_threads = d->num_threads;
    packed_product(&p);
}

static void add(char *residual, const char *x, int64_t n, int is_bfloat16, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && n >= PARALLEL_FROM)
    for (int64_t i = 0; i < n; i += LANES)
        if (is_bfloat16)
            set(residual, i, get(residual, i, 1) + get(x, i, 1), 1);
        else
            set(residual, i, get(residual, i, 0) + get(x, i, 0), 0);
}

static void changed(const DecoderStep *d, int32_t layer, int32_t map) {
    if (d->changed) d->changed(layer, map);
}

void decode(const DecoderStep *d) {
    const Step *step = d->step;
    const int64_t rows = d->num_rows, dim = step->head_dim, heads = step->num_heads, kv_heads = step->num_kv_heads;
    const int half = step->is_bfloat16, threads = d->num_threads;
    for (int i = 0; i < d->num_layers; i++) {
        const DecoderLayer *l = d->layers + i;
        rms_norm(d->residual, l->input_norm, d->normed, rows, d->hidden, l->input_eps, 0, half, threads);
        multiply(l->query, d->normed, d->q, d);
        changed(d, i, QUERY);
        multiply(l->key, d->normed, d->k, d);
        changed(d, i, KEY);
        multiply(l->value, d->normed, d->v, d);
        changed(d, i, VALUE);
        if (l->query_norm) {
            rms_norm(d->q, l->query_norm, d->q, rows * heads, dim, l->query_eps, 0, half, threads);
            rms_norm(d->k, l->key_norm, d->k, rows * kv_heads, dim, l->key_eps, 0, half, threads);
        }
        const Rotated parts[2] = {{d->q, heads * dim, dim, d->q, heads}, {d->k, kv_heads * dim, dim, d->k, kv_heads}};
        rotate(parts, 2, rows, dim, d->cosine, d->sine, half, threads);
        const Layer layer = {l->keys, l->values, d->q, d->k, d->v, d->attended, heads * dim, dim,
                             kv_heads * dim, dim, kv_heads * dim, dim, l->scaling, l->window};
        paged_attention(step, &layer);
        multiply(l->output, d->attended, d->added, d);
        changed(d, i, OUTPUT);
        add(d->residual, d->added, rows * d->hidden, half, threads);
        rms_norm(d->residual, l->mlp_norm, d->normed, rows, d->hidden, l->mlp_eps, 0, half, threads);
        if (d->changed) {
            multiply(l->gate, d->normed, d->gated, d);
            changed(d, i, GATE);
            multiply(l->up, d->normed, d->up, d);
            changed(d, i, UP);
            silu_times(d->gated, d->up, rows * l->gate->n, half, threads);
        } else {
            multiply(l->gated, d->normed, d->gated, d);
        }
        multiply(l->down, d->gated, d->added, d);
        changed(d, i, DOWN);
        add(d->residual, d->added, rows * d->hidden, half, threads);
    }
}
