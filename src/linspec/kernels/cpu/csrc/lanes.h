/* As many floats as one register holds: what the hot loops of mixers are written in. Sixteen floats (see
 * vector.h) are one such vector or several, and compilers keep several of them in memory.
 *
 * Results do not depend on LS_LANES: sums over features always have sixteen partial sums, which are added up
 * in one order. */
#ifndef LINSPEC_LANES_H
#define LINSPEC_LANES_H

#include <stdint.h>
#include <string.h>

#ifndef LS_LANES
#define LS_LANES 16
#define LS_LANES_FMA(a, b, c) LS_FMA(a, b, c)
#endif
#define LS_PARTS (16 / LS_LANES)
/* queries that share a load of a row, as many as the registers can hold */
#ifndef LS_QUERIES
#define LS_QUERIES 3
#endif

typedef float vl __attribute__((vector_size(4 * LS_LANES)));
typedef int32_t vli __attribute__((vector_size(4 * LS_LANES)));
typedef uint16_t vlh __attribute__((vector_size(2 * LS_LANES)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL(n, i) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)

INLINE vl vl_load(const float *p) {
    vl v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void vl_store(float *p, vl v) { memcpy(p, &v, sizeof v); }

/* the first `n` < LS_LANES floats, zeros behind them */
INLINE vl vl_load_part(const float *p, int n) {
    float part[LS_LANES] = {0};
    memcpy(part, p, (size_t)n * sizeof *p);
    return vl_load(part);
}

INLINE void vl_store_part(float *p, vl v, int n) {
    float part[LS_LANES];
    vl_store(part, v);
    memcpy(p, part, (size_t)n * sizeof *p);
}

INLINE vl vl_set1(float x) { return x - (vl){0}; }

INLINE vli vli_load(const void *p) {
    vli v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vl vl_bits(vli v) {
    vl f;
    memcpy(&f, &v, sizeof f);
    return f;
}

INLINE vli vli_bits(vl v) {
    vli i;
    memcpy(&i, &v, sizeof i);
    return i;
}

INLINE vl vl_select(vli mask, vl yes, vl no) {
    return vl_bits((mask & vli_bits(yes)) | (~mask & vli_bits(no)));
}

/* the second where one is not a number, as x86 has it */
#ifdef LS_LANES_MAX
INLINE vl vl_max(vl a, vl b) { return LS_LANES_MAX(a, b); }
INLINE vl vl_min(vl a, vl b) { return LS_LANES_MIN(a, b); }
#else
INLINE vl vl_max(vl a, vl b) { return vl_select((vli)(a > b), a, b); }
INLINE vl vl_min(vl a, vl b) { return vl_select((vli)(a < b), a, b); }
#endif

#if defined(__clang__)
#define LANE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LANE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vli){__VA_ARGS__})
#endif

/* HALVES, QUARTERS: two vectors folded in the middle, and the halves of each once more. PAIRS, SINGLES: within
 * neighbouring fours, which every instruction set can shuffle at once. TURNED_n: moved by n lanes. */
#if LS_LANES == 16
#define HALVES_LOW 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HALVES_HIGH 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define QUARTERS_LOW 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define QUARTERS_HIGH 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#define PAIRS_LOW 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define PAIRS_HIGH 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define SINGLES_LOW 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30
#define SINGLES_HIGH 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31
#define TURNED_8 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7
#define TURNED_4 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11
#define TURNED_2 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13
#define TURNED_1 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#elif LS_LANES == 8
#define HALVES_LOW 0, 1, 2, 3, 8, 9, 10, 11
#define HALVES_HIGH 4, 5, 6, 7, 12, 13, 14, 15
#define PAIRS_LOW 0, 1, 8, 9, 4, 5, 12, 13
#define PAIRS_HIGH 2, 3, 10, 11, 6, 7, 14, 15
#define SINGLES_LOW 0, 2, 8, 10, 4, 6, 12, 14
#define SINGLES_HIGH 1, 3, 9, 11, 5, 7, 13, 15
#define TURNED_4 4, 5, 6, 7, 0, 1, 2, 3
#define TURNED_2 2, 3, 0, 1, 6, 7, 4, 5
#define TURNED_1 1, 0, 3, 2, 5, 4, 7, 6
#else
#define PAIRS_LOW 0, 1, 4, 5
#define PAIRS_HIGH 2, 3, 6, 7
#define SINGLES_LOW 0, 2, 4, 6
#define SINGLES_HIGH 1, 3, 5, 7
#define TURNED_2 2, 3, 0, 1
#define TURNED_1 1, 0, 3, 2
#endif
#define FOLD(a, b, how) (LANE_SHUFFLE(a, b, how##_LOW) + LANE_SHUFFLE(a, b, how##_HIGH))

/* Lane i of the result is the sum of the lanes of v[i]: those that are half a vector apart are added first,
 * then a quarter, and so on. */
INLINE vl vl_sums(const vl *v) {
    vl w[4];
#if LS_LANES == 16
    UNROLL(4, i) w[i] = FOLD(FOLD(v[i], v[4 + i], HALVES), FOLD(v[8 + i], v[12 + i], HALVES), QUARTERS);
#elif LS_LANES == 8
    UNROLL(4, i) w[i] = FOLD(v[i], v[4 + i], HALVES);
#else
    UNROLL(4, i) w[i] = v[i];
#endif
    return FOLD(FOLD(w[0], w[1], PAIRS), FOLD(w[2], w[3], PAIRS), SINGLES);
}

#if LS_LANES == 16
#define WITH_TURNED_8(v, op) v = op(v, LANE_SHUFFLE(v, v, TURNED_8))
#else
#define WITH_TURNED_8(v, op) (void)0
#endif
#if LS_LANES >= 8
#define WITH_TURNED_4(v, op) v = op(v, LANE_SHUFFLE(v, v, TURNED_4))
#else
#define WITH_TURNED_4(v, op) (void)0
#endif
/* every lane becomes the sum (or so) of all, in the order of `vl_sums` */
#define OVER_LANES(v, op)                              \
    do {                                               \
        WITH_TURNED_8(v, op);                          \
        WITH_TURNED_4(v, op);                          \
        v = op(v, LANE_SHUFFLE(v, v, TURNED_2));       \
        v = op(v, LANE_SHUFFLE(v, v, TURNED_1));       \
    } while (0)
#define LANES_PLUS(a, b) ((a) + (b))

INLINE float vl_sum(vl v) {
    OVER_LANES(v, LANES_PLUS);
    return v[0];
}

INLINE float vl_largest(vl v) {
    OVER_LANES(v, vl_max);
    return v[0];
}

/* sixteen partial sums in one vector, or the first step of adding them up */
INLINE vl vl_folded(const vl *parts) {
    vl sums[LS_PARTS];
    UNROLL(LS_PARTS, i) sums[i] = parts[i];
    for (int n = LS_PARTS / 2; n; n /= 2) UNROLL(n, i) sums[i] += sums[i + n];
    return sums[0];
}

/* e^x with a relative error below 3e-7; 0 below -87, the largest finite power above 88. */
INLINE vl vl_exp(vl x) {
    vl in = vl_min(vl_max(x, vl_set1(-87.0f)), vl_set1(88.0f));
    /* nearest integer, ties to even: adding 1.5 * 2^23 leaves no room for a fraction */
    const vl magic = vl_set1(12582912.0f);
    vli n = vli_bits(in * vl_set1(1.44269504f) + magic) - vli_bits(magic);
    vl whole = __builtin_convertvector(n, vl);
    vl r = LS_LANES_FMA(whole, vl_set1(-0.693145752f), in);
    r = LS_LANES_FMA(whole, vl_set1(-1.42860677e-6f), r);
    vl p = vl_set1(1.98756915e-4f);
    p = LS_LANES_FMA(p, r, vl_set1(1.39819995e-3f));
    p = LS_LANES_FMA(p, r, vl_set1(8.33345191e-3f));
    p = LS_LANES_FMA(p, r, vl_set1(4.16657962e-2f));
    p = LS_LANES_FMA(p, r, vl_set1(1.66666655e-1f));
    p = LS_LANES_FMA(p, r, vl_set1(5.00000012e-1f));
    p = LS_LANES_FMA(p, r * r, r) + vl_set1(1.0f);
    vl y = p * vl_bits((n + 127) << 23);
    y = vl_select((vli)(x < vl_set1(-87.0f)), vl_set1(0.0f), y);
    return vl_select((vli)(x == x), y, x);
}

/* tanh with an error below 2e-7, relative where it is small */
INLINE vl vl_tanh(vl x) {
    vl square = x * x, p = vl_set1(-6.00180216e-3f);
    p = LS_LANES_FMA(p, square, vl_set1(2.09314246e-2f));
    p = LS_LANES_FMA(p, square, vl_set1(-5.38370162e-2f));
    p = LS_LANES_FMA(p, square, vl_set1(0.133326784f));
    p = LS_LANES_FMA(p, square, vl_set1(-0.333333284f));
    vl small = LS_LANES_FMA(p, x * square, x), size = vl_bits(vli_bits(x) & 0x7fffffff);
    vl large = vl_set1(1.0f) - vl_set1(2.0f) / (vl_exp(size + size) + vl_set1(1.0f));
    large = vl_select((vli)(x < vl_set1(0.0f)), -large, large);
    return vl_select((vli)(size < vl_set1(0.64f)), small, large);
}

/* cap tanh(x / cap) */
INLINE vl vl_capped(vl x, float cap) { return vl_set1(cap) * vl_tanh(x / vl_set1(cap)); }

#endif
