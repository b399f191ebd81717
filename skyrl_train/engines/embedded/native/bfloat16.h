/* bfloat16: the upper half of a float. Sixteen numbers, or sixteen pairs, at a time. */
#pragma once
#include "vector.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef uint16_t half_vec __attribute__((vector_size(32)));
typedef uint16_t half_vec_unaligned __attribute__((vector_size(32), aligned(2)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef int32_t ivec_unaligned __attribute__((vector_size(64), aligned(2)));

INLINE float float_of_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

INLINE vec load_bf16(const uint16_t *p) {
    half_vec x = *(const half_vec_unaligned *)p;
    union { uvec u; vec v; } y = {__builtin_convertvector(x, uvec) << 16};
    return y.v;
}

/* Rounds to the nearest, ties to even, as torch does. */
INLINE void store_bf16(uint16_t *p, vec x) {
    union { vec v; uvec u; } y = {x};
    uvec rounded = (y.u + 0x7fff + ((y.u >> 16) & 1)) >> 16;
    uvec is_nan = (uvec)(x != x);
    rounded = (rounded & ~is_nan) | (0x7fc0 & is_nan);
    *(half_vec_unaligned *)p = __builtin_convertvector(rounded, half_vec);
}

/* Sixteen pairs of bfloat16 in memory order. */
INLINE ivec load_pairs(const uint16_t *p) { return *(const ivec_unaligned *)p; }

/* sum + x[0] * w[.][0] + x[1] * w[.][1]: the pair `x` with each of sixteen */
INLINE vec dot_pairs(vec sum, int32_t x, ivec w) {
#ifdef __AVX512BF16__
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
#else
    union { ivec i; vec v; } low = {w << 16}, high = {w & (int32_t)0xffff0000};
    return sum + float_of_bf16((uint16_t)x) * low.v + float_of_bf16((uint16_t)((uint32_t)x >> 16)) * high.v;
#endif
}

/* Sixteen numbers of an array of floats, or of bfloat16, from element i on. `is_bfloat16` is a constant where it matters. */
INLINE vec get(const void *p, int64_t i, const int is_bfloat16) {
    return is_bfloat16 ? load_bf16((const uint16_t *)p + i) : load((const float *)p + i);
}

INLINE void set(void *p, int64_t i, vec x, const int is_bfloat16) {
    if (is_bfloat16)
        store_bf16((uint16_t *)p + i, x);
    else
        store((float *)p + i, x);
}

/* As it would come back from memory. */
INLINE vec rounded(vec x, const int is_bfloat16) {
    if (!is_bfloat16) return x;
    uint16_t y[LANES];
    store_bf16(y, x);
    return load_bf16(y);
}
