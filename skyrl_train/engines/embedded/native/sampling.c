/* One token a row by the inverse of the cumulative distribution, and its log-probability; float32.
 *
 * A token is drawn from softmax(draw / temperature) and scored under softmax(score / temperature); temperature 0 is
 * the first largest logit, scored at temperature 1. `draw` and `score` may be one array. Probabilities are summed in
 * blocks, the blocks in double.
 */
#include <math.h>
#include <omp.h>

#include "vector.h"

#define BLOCK 64

/* The sum of exp((x - top) / temperature), the terms into `weights`; V is padded to a multiple of LANES with 0. */
static double exponentials(const float *x, int vocab, float top, float inverse, float *weights) {
    double total = 0;
    int v = 0;
    for (; v + BLOCK <= vocab; v += BLOCK) {
        vec sum = splat(0);
        for (int i = 0; i < BLOCK; i += LANES) {
            vec w = vexp((load(x + v + i) - top) * inverse);
            store(weights + v + i, w);
            sum += w;
        }
        total += sum1(sum);
    }
    for (; v < vocab; v += LANES) {
        vec tail = splat(-INFINITY);
        for (int i = 0; i < LANES && v + i < vocab; i++) tail[i] = x[v + i];
        vec w = vexp((tail - top) * inverse);
        store(weights + v, w);
        total += sum1(w);
    }
    return total;
}

/* NaN if any is: comparisons alone would lose it. */
static float largest(const float *x, int vocab) {
    vec high = splat(-INFINITY);
    ivec is_nan = {0};
    int v = 0;
    for (; v + LANES <= vocab; v += LANES) {
        vec y = load(x + v);
        high = vmax(high, y);
        is_nan |= y != y;
    }
    float top = max1(high);
    int found = 0;
    for (; v < vocab; v++) {
        top = x[v] > top ? x[v] : top;
        found |= x[v] != x[v];
    }
    for (int i = 0; i < LANES; i++) found |= is_nan[i];
    return found ? NAN : top;
}

/* The first token whose cumulative weight exceeds target; never one of weight 0. */
static int at_cumulative(const float *weights, int vocab, double target) {
    double before = 0;
    int candidate = 0;
    for (int start = 0; start < vocab; start += BLOCK) {
        const int end = start + BLOCK < vocab ? start + BLOCK : vocab;
        vec sum = splat(0);
        double block = 0;
        if (end - start == BLOCK) {
            for (int i = start; i < end; i += LANES) sum += load(weights + i);
            block = sum1(sum);
        } else {
            for (int i = start; i < end; i += LANES) block += sum1(load(weights + i)); /* as in exponentials */
        }
        if (before + block > target || end == vocab) {
            double within = before;
            for (int v = start; v < end; v++) {
                if (weights[v] > 0) candidate = v;
                within += weights[v];
                if (within > target && weights[v] > 0) return v;
            }
            if (before + block > target) return candidate; /* the two orders of summation differ by a rounding */
        }
        if (block > 0 && end < vocab)
            for (int v = end - 1; v >= start; v--)
                if (weights[v] > 0) {
                    candidate = v;
                    break;
                }
        before += block;
    }
    return candidate;
}

static int first_of(const float *x, int vocab, float value) {
    for (int v = 0; v < vocab; v++)
        if (x[v] == value) return v;
    return 0;
}

/* draw and score [n, V] with row strides in floats, scratch [num_threads, V + LANES] */
void sample_rows(const float *draw, int64_t draw_row, const float *score, int64_t score_row, int32_t num_rows,
                 int32_t vocab, const float *temperature, const double *uniform, int64_t *tokens, float *logprobs,
                 float *scratch, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int r = 0; r < num_rows; r++) {
        float *weights = scratch + (int64_t)omp_get_thread_num() * (vocab + LANES);
        const float *x = draw + r * draw_row, *y = score + r * score_row;
        const int is_greedy = temperature[r] == 0;
        const float inverse = is_greedy ? 1.0f : 1.0f / temperature[r];
        float top = largest(x, vocab);
        double total = 0;
        int token;
        if (is_greedy) {
            token = first_of(x, vocab, top);
            if (x == y) total = exponentials(x, vocab, top, inverse, weights);
        } else {
            total = exponentials(x, vocab, top, inverse, weights);
            token = at_cumulative(weights, vocab, fmin(uniform[r] * total, nextafter(total, 0)));
        }
        if (x != y) {
            top = largest(y, vocab);
            total = exponentials(y, vocab, top, inverse, weights);
        }
        tokens[r] = token;
        logprobs[r] = (float)((double)((y[token] - top) * inverse) - log(total));
    }
}
