/* Sixteen floats at a time, in GCC's vector extension: one AVX-512 register, two of AVX2, four of NEON. */
#pragma once
#include <stdint.h>
#include <string.h>

#define LANES 16
typedef float vec __attribute__((vector_size(64)));
typedef float vec_unaligned __attribute__((vector_size(64), aligned(4)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef int32_t ivec4 __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec_unaligned *)p; }
INLINE void store(float *p, vec x) { *(vec_unaligned *)p = x; }
INLINE vec splat(float x) { return x - (vec){0}; }

INLINE vec4 fold(vec x) {
    union { vec v; vec8 half[2]; } a = {x};
    union { vec8 v; vec4 half[2]; } b = {a.half[0] + a.half[1]};
    return b.half[0] + b.half[1];
}

/* The sums of four vectors, at once: a 4 x 4 transpose and three additions. */
INLINE vec4 sum4(vec a, vec b, vec c, vec d) {
    vec4 w = fold(a), x = fold(b), y = fold(c), z = fold(d);
    vec4 wx = __builtin_shuffle(w, x, (ivec4){0, 4, 1, 5}) + __builtin_shuffle(w, x, (ivec4){2, 6, 3, 7});
    vec4 yz = __builtin_shuffle(y, z, (ivec4){0, 4, 1, 5}) + __builtin_shuffle(y, z, (ivec4){2, 6, 3, 7});
    return __builtin_shuffle(wx, yz, (ivec4){0, 1, 4, 5}) + __builtin_shuffle(wx, yz, (ivec4){2, 3, 6, 7});
}

INLINE float sum1(vec x) {
    vec4 s = fold(x);
    return (s[0] + s[1]) + (s[2] + s[3]);
}

INLINE float max1(vec x) {
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
    return m;
}

INLINE vec choose(ivec mask, vec yes, vec no) {
    union { vec v; ivec i; } a = {yes}, b = {no}, result;
    result.i = (a.i & mask) | (b.i & ~mask);
    return result.v;
}

INLINE vec vmax(vec a, vec b) { return choose(a > b, a, b); }

/* exp(x) for x <= 0 to about 1e-7 relative; 0 below -87. Cephes' expf: 2^n times a polynomial on [-ln2/2, ln2/2]. */
INLINE vec vexp(vec x) {
    vec clamped = vmax(x, splat(-87.0f));
    vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vec n = (clamped * 1.44269504088896341f + magic) - magic;
    vec r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec bits = (__builtin_convertvector(n, ivec) + 127) << 23;
    vec scale;
    memcpy(&scale, &bits, sizeof scale);
    return choose(x > splat(-87.0f), p * scale, splat(0.0f));
}

INLINE vec silu(vec x) {
    ivec negative = x < splat(0);
    vec e = vexp(choose(negative, x, -x));
    return x * (choose(negative, e, splat(1.0f)) / (e + 1.0f));
}
