/* Weights in the blocks of a GGUF file, and how they lie here.
 *
 * A tile has 32 channels and, for every group of 32 inputs in turn,
 *     scales   f16 [32], then f16 minima [32] where the format has them; of the formats named K for eight
 *              groups together, followed in each by two lines of 32 bytes: factors of scales and minima
 *              (Q4_K, Q5_K), or of the scales of inputs 0-15 and 16-31 (Q6_K)
 *     high     bits of codes. 5 bits: byte (c, i) of [32][4] has bit 4 of input 4 q + i as its bit q.
 *              6 bits: two such parts for inputs 0-15 and 16-31, bits 4 and 5 as bits 2 q and 2 q + 1
 *     low      [4][32][4] bytes: byte (q, c, i) has bits 0-3 of input 4 q + i in its low half and
 *              of input 16 + 4 q + i in its high half; of 8 bits [8][32][4] bytes of code + 128
 * A weight is scale * (code - offset) + minimum. No value is changed, and no bit added but to the 6-bit
 * factors, which get bytes. All parts are multiples of 64 bytes. */
#ifndef LINSPEC_BLOCKS_H
#define LINSPEC_BLOCKS_H

#include <string.h>

#include "structs.h"

#define LS_BLOCK_SUMS 3   /* of the codes of a group: inputs 0-15, 16-31, both; all negated */
#define LS_BLOCK_SCALES 2 /* of a group: the scale of its codes, and that times their sum */
#define LS_SUPER 8        /* groups that share the scales of a K format */
#define LS_LINE (4 * LS_TILE)

#define LS_ALWAYS static inline __attribute__((always_inline))

/* IQ4_NL: what codes stand for, plus 128 */
static const uint8_t ls_levels[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                      129, 141, 153, 166, 181, 197, 217, 241};

LS_ALWAYS int ls_block_bits(int format) {
    switch (format) {
        case LS_Q8_0: return 8;
        case LS_Q6_K: return 6;
        case LS_Q5_0: case LS_Q5_1: case LS_Q5_K: return 5;
        default: return 4;
    }
}

/* what codes have too much */
LS_ALWAYS int ls_block_offset(int format) {
    switch (format) {
        case LS_Q8_0: case LS_IQ4_NL: return 128;
        case LS_Q6_K: return 32;
        case LS_Q5_0: return 16;
        case LS_Q4_0: return 8;
        default: return 0;
    }
}

LS_ALWAYS int ls_block_is_k(int format) {
    return format == LS_Q4_K || format == LS_Q5_K || format == LS_Q6_K;
}

LS_ALWAYS int ls_block_has_minima(int format) {
    return format == LS_Q4_1 || format == LS_Q5_1 || format == LS_Q4_K || format == LS_Q5_K;
}

/* bytes of the f16 scales and minima of a tile */
LS_ALWAYS int ls_block_header(int format) {
    return 2 * LS_TILE * (1 + ls_block_has_minima(format));
}

LS_ALWAYS int ls_block_high(int format) {
    return ls_block_bits(format) == 6 ? 2 * LS_LINE : ls_block_bits(format) == 5 ? LS_LINE : 0;
}

/* bytes of a group without header */
LS_ALWAYS int ls_block_group(int format) {
    int low = ls_block_bits(format) == 8 ? 8 * LS_LINE : 4 * LS_LINE;
    return (ls_block_is_k(format) ? 2 * LS_TILE : 0) + ls_block_high(format) + low;
}

/* bytes of a tile of so many inputs */
LS_ALWAYS size_t ls_block_tile_bytes(int format, int inputs) {
    size_t groups = (size_t)inputs / LS_GROUP;
    size_t headers = ls_block_is_k(format) ? groups / LS_SUPER : groups;
    return groups * (size_t)ls_block_group(format) + headers * (size_t)ls_block_header(format);
}

/* where group g of a tile is, and its header */
LS_ALWAYS const uint8_t *ls_block_at(int format, const uint8_t *tile, int g, const uint8_t **header) {
    size_t head = (size_t)ls_block_header(format), group = (size_t)ls_block_group(format);
    size_t share = ls_block_is_k(format) ? LS_SUPER : 1, super = (size_t)g / share;
    *header = tile + super * (head + share * group);
    return *header + head + (size_t)g % share * group;
}

/* ---- single weights: what the layout means, for what is not hot */

static inline float ls_half(const uint8_t *at) {
    uint16_t half;
    memcpy(&half, at, sizeof half);
    /* widened, then scaled: this makes subnormal numbers normal. What is not finite stays so */
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    float f;
    if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    memcpy(&f, &bits, sizeof f);
    if ((half & 0x7c00) != 0x7c00) f *= 5.192296858534828e33f; /* 2^112 */
    memcpy(&bits, &f, sizeof f);
    bits |= sign;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* the code of input k < 32 of a channel; `codes` is behind the scales */
static inline int ls_block_code(int format, const uint8_t *codes, int channel, int k) {
    int quad = k / 4, in_line = channel * 4 + k % 4, bits = ls_block_bits(format);
    const uint8_t *low = codes + ls_block_high(format);
    if (bits == 8) return low[quad * LS_LINE + in_line];
    int code = low[quad % 4 * LS_LINE + in_line] >> (quad < 4 ? 0 : 4) & 15;
    if (bits == 5) code |= (codes[in_line] >> quad & 1) << 4;
    if (bits == 6) code |= (codes[quad / 4 * LS_LINE + in_line] >> 2 * (quad % 4) & 3) << 4;
    return format == LS_IQ4_NL ? ls_levels[code] : code;
}

/* scale of input k < 32 of a channel; `group` is behind the header */
static inline float ls_block_scale(int format, const uint8_t *header, const uint8_t *group, int channel,
                                   int k) {
    float scale = ls_half(header + 2 * channel);
    if (!ls_block_is_k(format)) return scale;
    int line = format == LS_Q6_K ? k / 16 : 0;
    return scale * (float)(int8_t)group[line * LS_TILE + channel];
}

static inline float ls_block_minimum(int format, const uint8_t *header, const uint8_t *group,
                                     int channel) {
    if (!ls_block_has_minima(format)) return 0.0f;
    float minimum = ls_half(header + 2 * LS_TILE + 2 * channel);
    if (!ls_block_is_k(format)) return minimum;
    return -minimum * (float)group[LS_TILE + channel];
}

#endif
