/* Sixteen floats at a time, in the compiler's own vector notation: one source for every instruction
 * set. Included by the isa_*.c files after they have chosen their target and defined LS_FMA. */
#ifndef LINSPEC_VECTOR_H
#define LINSPEC_VECTOR_H

#include <string.h>

#include "kernels.h"

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
#include "lanes.h"
/* one register of codes, and of floats: for tiles of blocks */
#ifdef LS_REGISTER
typedef uint8_t bb __attribute__((vector_size(LS_REGISTER)));
typedef uint16_t bh __attribute__((vector_size(LS_REGISTER)));
typedef float bf __attribute__((vector_size(LS_REGISTER)));
#endif

INLINE vf vf_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }

/* the first `n` < 16 floats, zeros behind them */
INLINE vf vf_load_part(const float *p, int n) {
    float part[16] = {0};
    memcpy(part, p, (size_t)n * sizeof *p);
    return vf_load(part);
}

INLINE void vf_store_part(float *p, vf v, int n) {
    float part[16];
    vf_store(part, v);
    memcpy(p, part, (size_t)n * sizeof *p);
}

INLINE vf vf_set1(float x) { return (vf){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE vf vf_bits(vi v) {
    vf f;
    memcpy(&f, &v, sizeof f);
    return f;
}

INLINE vi vi_bits(vf v) {
    vi i;
    memcpy(&i, &v, sizeof i);
    return i;
}

INLINE vf vf_select(vi mask, vf yes, vf no) {
    return vf_bits((mask & vi_bits(yes)) | (~mask & vi_bits(no)));
}

/* the second where one is not a number, as x86 has it */
#ifndef LS_MAX
#define LS_MAX(a, b) vf_select((vi)((a) > (b)), a, b)
#define LS_MIN(a, b) vf_select((vi)((a) < (b)), a, b)
#endif
INLINE vf vf_max(vf a, vf b) { return LS_MAX(a, b); }
INLINE vf vf_min(vf a, vf b) { return LS_MIN(a, b); }
INLINE vf vf_abs(vf a) { return vf_bits(vi_bits(a) & 0x7fffffff); }

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
/* two vectors of halves, quarters, ... that are folded onto each other */
#define HALVES_0 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HALVES_1 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define QUARTERS_0 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define QUARTERS_1 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#define PAIRS_0 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29
#define PAIRS_1 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31
#define SINGLE_0 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define SINGLE_1 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define REDUCE_STEP(v, op, how) v = op(SHUFFLE(v, v, how##_0), SHUFFLE(v, v, how##_1))
#define REDUCE(v, op)         \
    do {                        \
        REDUCE_STEP(v, op, HALVES);   \
        REDUCE_STEP(v, op, QUARTERS); \
        REDUCE_STEP(v, op, PAIRS);    \
        REDUCE_STEP(v, op, SINGLE);   \
    } while (0)
#define PLUS(a, b) ((a) + (b))

/* Sum over the lanes, always in this order. */
INLINE float vf_sum(vf v) {
    REDUCE(v, PLUS);
    return v[0];
}

/* Nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction. */
INLINE vi vf_round(vf x) {
    const vf magic = vf_set1(12582912.0f);
    return vi_bits(x + magic) - vi_bits(magic);
}

/* a function of lanes.h, vector by vector */
#define BY_LANES(name, of)                              \
    INLINE vf name(vf x) {                              \
        vl parts[LS_PARTS];                             \
        memcpy(parts, &x, sizeof x);                    \
        UNROLL(LS_PARTS, i) parts[i] = of(parts[i]);    \
        memcpy(&x, parts, sizeof x);                    \
        return x;                                       \
    }
BY_LANES(vf_exp, vl_exp)
BY_LANES(vf_tanh, vl_tanh)

/* erf with an error below 2e-7, relative where it is small: a polynomial, and one for log(1 - erf) */
INLINE vf vf_erf(vf x) {
    vf square = x * x, p = vf_set1(7.88249745e-5f);
    p = LS_FMA(p, square, vf_set1(-8.01885501e-4f));
    p = LS_FMA(p, square, vf_set1(5.18931216e-3f));
    p = LS_FMA(p, square, vf_set1(-2.68543288e-2f));
    p = LS_FMA(p, square, vf_set1(0.112835974f));
    p = LS_FMA(p, square, vf_set1(-0.37612626f));
    p = LS_FMA(p, square, vf_set1(0.128379166f));
    vf small = LS_FMA(p, x, x), size = vf_abs(x), far = vf_min(size, vf_set1(4.0f));
    p = vf_set1(1.61406160e-6f);
    p = LS_FMA(p, far, vf_set1(-4.55906229e-5f));
    p = LS_FMA(p, far, vf_set1(5.92769531e-4f));
    p = LS_FMA(p, far, vf_set1(-4.74022236e-3f));
    p = LS_FMA(p, far, vf_set1(2.63647176e-2f));
    p = LS_FMA(p, far, vf_set1(-0.109978244f));
    p = LS_FMA(p, far, vf_set1(-0.631937087f));
    p = LS_FMA(p, far, vf_set1(-1.13016665f));
    p = LS_FMA(p, far, vf_set1(3.03212961e-4f));
    vf large = vf_set1(1.0f) - vf_exp(p);
    large = vf_select((vi)(x < vf_set1(0.0f)), -large, large);
    return vf_select((vi)(size <= vf_set1(4.0f)), vf_select((vi)(size < vf_set1(1.0f)), small, large),
                     vf_select((vi)(x == x), large, x));
}

/* The table of an instruction set, from the functions of one isa_*.c file. */
#define LS_OPS(set)                                                                       \
    {.name = set,         .int8 = int8_tile,             .int4 = int4_tile,               \
     .f32 = f32_tile,     .bf16 = bf16_tile,             .quantize_row = quantize_row,    \
     .copy_row = copy_row, .narrow_row = narrow_row,     .epilogue = epilogue,            \
     .rms_norm = rms_norm, .layer_norm = layer_norm,     .normalize = normalize,          \
     .activate = activate, .cap = cap_row,               .map = map_row,                  \
     .gates = gates_of,    .attend = attend_blocks,      .merge = merge_partials,         \
     .attend_selected = attend_selected, .bound_pages = bound_pages,                      \
     .code_pages = code_pages, .select_positions = select_positions,                      \
     .attend_listed = attend_listed, .attend_shadow = attend_shadow,                      \
     .end_attention = end_attention, .pack_nibbles = pack_nibbles,                         \
     .close_groups = close_groups, .close_on_path = close_on_path,                        \
     .fold = fold_rows,    .read_summed = read_summed,   .fold_summed = fold_summed,      \
     .blocks = block_tile, .quantize_blocks = quantize_blocks}

#endif
