/* 64-bit Arm with the dot product instructions of Armv8.2. Weights become signed, as the instruction
 * wants both sides alike. */
#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
/* with its architecture: the instruction exists from that one on */
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>

#define LS_FMA(a, b, c) ls_fma(a, b, c)
#include <string.h>
typedef float ls_v16 __attribute__((vector_size(64)));
static inline __attribute__((always_inline)) ls_v16 ls_fma(ls_v16 a, ls_v16 b, ls_v16 c) {
    float32x4_t x[4], y[4], z[4];
    memcpy(x, &a, sizeof a);
    memcpy(y, &b, sizeof b);
    memcpy(z, &c, sizeof c);
    for (int i = 0; i < 4; i++) z[i] = vfmaq_f32(z[i], x[i], y[i]);
    memcpy(&c, z, sizeof c);
    return c;
}
#define LS_FLOAT_ROWS 2
#define LS_LANES 4
#define LS_LANES_FMA(a, b, c) ((vl)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define LS_LANES_HALF(p) ((vl)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(p)))))
#define LS_REGISTER 16
#include "vector.h"
#include "row_ops.inc.h"
#include "block_row_ops.inc.h"
#include "float_tiles.inc.h"

INLINE int8x16_t broadcast4(const int8_t *four) {
    int32_t bits;
    memcpy(&bits, four, sizeof bits);
    return vreinterpretq_s8_s32(vdupq_n_s32(bits));
}

/* sum + dot products of four neighbours each; older compilers have the intrinsic only where the whole
 * program is built for such processors */
INLINE int32x4_t dot(int32x4_t sum, int8x16_t a, int8x16_t b) {
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(b));
    return sum;
}

/* sixteen channels, one line of weights for each four inputs */
INLINE void int8_part(const uint8_t *w, const int8_t *x, int quads, int stride, float *out) {
    int32x4_t sums[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
    for (int q = 0; q < quads; q++, w += 128, x += 4 * stride)
        for (int i = 0; i < 4; i++) {
            uint8x16_t codes = veorq_u8(vld1q_u8(w + 16 * i), vdupq_n_u8(128));
            sums[i] = dot(sums[i], vreinterpretq_s8_u8(codes), broadcast4(x));
        }
    for (int i = 0; i < 4; i++) vst1q_f32(out + 4 * i, vcvtq_f32_s32(sums[i]));
}

static void int8_tile(const uint8_t *w, const int8_t *x, const int32_t *offsets, int quads,
                      int rows, float *out) {
    (void)offsets;
    for (int half = 0; half < 2; half++)
        for (int r = 0; r < rows; r++)
            int8_part(w + 64 * half, x + 4 * r, quads, rows, out + r * LS_TILE + 16 * half);
}

/* four channels of one group of inputs */
INLINE float32x4_t int4_four(const uint8_t *codes, const uint8_t *scales, const int8_t *x, int rows,
                             float32x4_t sum) {
    const int8x16_t eight = vdupq_n_s8(8);
    int32x4_t total = vdupq_n_s32(0);
    for (int q = 0; q < 4; q++) {
        uint8x16_t both = vld1q_u8(codes + 128 * q);
        int8x16_t low = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))), eight);
        int8x16_t high = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(both, 4)), eight);
        total = dot(total, low, broadcast4(x + q * rows * 4));
        total = dot(total, high, broadcast4(x + (q + 4) * rows * 4));
    }
    uint16x4_t half;
    memcpy(&half, scales, sizeof half);
    float32x4_t scale = vreinterpretq_f32_u32(vshll_n_u16(half, 16));
    return vfmaq_f32(sum, vcvtq_f32_s32(total), scale);
}

static void int4_tile(const uint8_t *w, const int8_t *x, const int32_t *offsets, int groups,
                      int rows, float *out) {
    (void)offsets;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < LS_TILE / 4; i++) {
            float32x4_t sum = vdupq_n_f32(0.0f);
            for (int g = 0; g < groups; g++) {
                const uint8_t *at = w + (size_t)g * LS_INT4_BYTES;
                sum = int4_four(at + 64 + 16 * i, at + 8 * i, x + (g * 8 * rows + r) * 4, rows, sum);
            }
            vst1q_f32(out + r * LS_TILE + 4 * i, sum);
        }
}

#define LS_DOT_FLIP 0
#define LS_DOT(sum, keys, q) ((vli)dot((int32x4_t)(sum), (int8x16_t)(keys), (int8x16_t)(q)))
#include "mixer.inc.h"

#define LS_SLICES 1
#define LS_BLOCKS_AHEAD 1024
#define LS_SIGNED(format) 1

INLINE bf block_dot(int format, const bb *w, int quads, const int8_t *x, int stride,
                    int32_t start) {
    (void)format;
    int32x4_t sum = vdupq_n_s32(start);
    for (int q = 0; q < quads; q++)
        sum = dot(sum, (int8x16_t)w[q], broadcast4(x + q * stride * 4));
    return (bf)vcvtq_f32_s32(sum);
}

INLINE bb block_lookup(const uint8_t *levels, bb codes) {
    return (bb)vqtbl1q_u8(vld1q_u8(levels), (uint8x16_t)codes);
}

INLINE bf block_halves(const uint8_t *p) {
    uint16x4_t halves;
    memcpy(&halves, p, sizeof halves);
    return (bf)vcvt_f32_f16(vreinterpret_f16_u16(halves));
}

INLINE bf block_bytes(const uint8_t *p) {
    int8_t bytes[8] = {0};
    memcpy(bytes, p, 4);
    return (bf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(bytes)))));
}

INLINE bf block_fma(bf a, bf b, bf c) {
    return (bf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#include "block_tiles.inc.h"

const ls_ops ls_ops_neon = LS_OPS("neon-dotprod");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
