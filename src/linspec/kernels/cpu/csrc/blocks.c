/* Blocks of a GGUF file into the tiles of blocks.h, and single channels of tiles as floats. */
#include "kernels.h"

/* One block of a file, apart: codes as tiles have them, f16 scale and minimum as they are, and the
 * factors of a K format (two for each group). */
typedef struct {
    uint8_t halves[2][2];
    uint8_t factors[LS_SUPER][2];
    uint8_t codes[LS_SUPER * LS_GROUP];
} block;

static void nibbles(const uint8_t *from, int count, uint8_t *low, uint8_t *high) {
    for (int i = 0; i < count; i++) {
        low[i] = from[i] & 15;
        high[i] = from[i] >> 4;
    }
}

/* fifth bits of 32 codes, one after another */
static void add_fifth(const uint8_t *bits, uint8_t *codes) {
    for (int i = 0; i < LS_GROUP; i++) codes[i] |= (bits[i / 8] >> i % 8 & 1) << 4;
}

/* formats of 32 inputs */
static void read_small(int format, const uint8_t *at, block *to) {
    int scales = 2 * (1 + ls_block_has_minima(format)), bits = ls_block_bits(format);
    memcpy(to->halves, at, (size_t)scales);
    at += scales;
    if (bits == 8) {
        for (int i = 0; i < LS_GROUP; i++) to->codes[i] = at[i] ^ 128;
        return;
    }
    nibbles(at + (bits == 5 ? 4 : 0), 16, to->codes, to->codes + 16);
    if (bits == 5) add_fifth(at, to->codes);
}

/* The 6-bit factors of Q4_K and Q5_K: twelve bytes, of which the first eight hold the low ones. */
static void read_factors(const uint8_t *s, uint8_t (*to)[2]) {
    for (int j = 0; j < 4; j++) {
        to[j][0] = s[j] & 63;
        to[j][1] = s[j + 4] & 63;
        to[j + 4][0] = (s[j + 8] & 15) | (s[j] >> 6) << 4;
        to[j + 4][1] = s[j + 8] >> 4 | (s[j + 4] >> 6) << 4;
    }
}

static void read_q45_k(int format, const uint8_t *at, block *to) {
    const uint8_t *high = at + 16, *low = high + (format == LS_Q5_K ? 32 : 0);
    memcpy(to->halves, at, 4);
    read_factors(at + 4, to->factors);
    for (int g = 0; g < 4; g++) nibbles(low + 32 * g, 32, to->codes + 64 * g, to->codes + 64 * g + 32);
    for (int i = 0; format == LS_Q5_K && i < 256; i++)
        to->codes[i] |= (high[i % 32] >> i / 32 & 1) << 4;
}

static void read_q6_k(const uint8_t *at, block *to) {
    for (int half = 0; half < 2; half++) {
        const uint8_t *low = at + 64 * half, *high = at + 128 + 32 * half;
        uint8_t *codes = to->codes + 128 * half;
        nibbles(low, 64, codes, codes + 64);
        for (int i = 0; i < 128; i++) codes[i] |= (high[i % 32] >> 2 * (i / 32) & 3) << 4;
    }
    memcpy(to->factors, at + 192, 16);
    memcpy(to->halves, at + 208, 2);
}

static int is_finite(const uint8_t *half) { return (half[1] & 0x7c) != 0x7c; }

/* one group of one channel; `codes` is behind the scales */
static void write_codes(int format, const uint8_t *from, uint8_t *codes, int channel) {
    int bits = ls_block_bits(format);
    uint8_t *low = codes + ls_block_high(format) + 4 * channel, *high = codes + 4 * channel;
    for (int q = 0; q < 4; q++)
        for (int i = 0; i < 4; i++) {
            int first = from[4 * q + i], second = from[16 + 4 * q + i];
            if (bits == 8) {
                low[q * LS_LINE + i] = (uint8_t)first;
                low[(q + 4) * LS_LINE + i] = (uint8_t)second;
                continue;
            }
            low[q * LS_LINE + i] = (uint8_t)((first & 15) | second << 4);
            if (bits == 5) high[i] |= (uint8_t)((first >> 4) << q | (second >> 4) << (q + 4));
            if (bits == 6) {
                high[i] |= (uint8_t)((first >> 4) << 2 * q);
                high[LS_LINE + i] |= (uint8_t)((second >> 4) << 2 * q);
            }
        }
}

/* Block number `b` of a channel into its tile, which was zero; 0 if its scales are not finite. */
static int put(int format, const uint8_t *at, uint8_t *tile, int channel, int b) {
    block one;
    int groups = 1, k = ls_block_is_k(format), minima = ls_block_has_minima(format);
    if (!k) read_small(format, at, &one);
    else if (format == LS_Q6_K) read_q6_k(at, &one);
    else read_q45_k(format, at, &one);
    if (k) groups = LS_SUPER;
    for (int g = 0; g < groups; g++) {
        const uint8_t *header;
        uint8_t *group = (uint8_t *)ls_block_at(format, tile, b * groups + g, &header);
        uint8_t *head = (uint8_t *)header;
        if (g == 0) memcpy(head + 2 * channel, one.halves[0], 2);
        if (g == 0 && minima) memcpy(head + 2 * (LS_TILE + channel), one.halves[1], 2);
        if (k) {
            group[channel] = one.factors[g][0];
            group[LS_TILE + channel] = one.factors[g][1];
            group += 2 * LS_TILE;
        }
        write_codes(format, one.codes + g * LS_GROUP, group, channel);
    }
    return is_finite(one.halves[0]) && (!minima || is_finite(one.halves[1]));
}

static size_t file_bytes(int format) {
    switch (format) {
        case LS_Q8_0: return 34;
        case LS_Q4_0: case LS_IQ4_NL: return 18;
        case LS_Q4_1: return 20;
        case LS_Q5_0: return 22;
        case LS_Q5_1: return 24;
        case LS_Q4_K: return 144;
        case LS_Q5_K: return 176;
        default: return 210;
    }
}

typedef struct {
    int format, outputs, inputs;
    const uint8_t *raw;
    const int64_t *order;
    uint8_t *to;
    int32_t *unsound; /* of each thread */
} packing;

static void pack_body(void *context, int thread, int threads) {
    const packing *p = context;
    int tiles = (p->outputs + LS_TILE - 1) / LS_TILE, last = ls_share(tiles, thread + 1, threads);
    int blocks = p->inputs / (ls_block_is_k(p->format) ? LS_SUPER * LS_GROUP : LS_GROUP);
    size_t size = file_bytes(p->format), bytes = ls_block_tile_bytes(p->format, p->inputs);
    for (int tile = ls_share(tiles, thread, threads); tile < last; tile++) {
        uint8_t *to = p->to + (size_t)tile * bytes;
        memset(to, 0, bytes);
        for (int b = 0; b < blocks; b++)
            for (int c = 0; c < LS_TILE && tile * LS_TILE + c < p->outputs; c++) {
                size_t row = (size_t)p->order[tile * LS_TILE + c];
                const uint8_t *at = p->raw + (row * (size_t)blocks + (size_t)b) * size;
                if (!put(p->format, at, to, c, b)) p->unsound[thread] = 1;
            }
    }
}

/* Rows order[0..outputs - 1] of a tensor in a file into tiles; 0 if a scale is not finite. */
LS_API int32_t ls_pack_blocks(int32_t format, const uint8_t *raw, const int64_t *order, int32_t outputs,
                              int32_t inputs, uint8_t *to, int32_t threads) {
    enum { MOST = 256 };
    int32_t unsound[MOST] = {0};
    packing p = {format, outputs, inputs, raw, order, to, unsound};
    ls_parallel(pack_body, &p, threads < MOST ? threads : MOST, LS_SPIN_LAYER);
    for (int i = 0; i < MOST; i++)
        if (unsound[i]) return 0;
    return 1;
}

/* Rounded as the file format says: the product of scale and code first. */
void ls_block_row(const ls_linear_part *part, int inputs, int channel, float *to) {
    int format = part->format, c = channel % LS_TILE, k_format = ls_block_is_k(format);
    size_t bytes = ls_block_tile_bytes(format, inputs);
    const uint8_t *tile = (const uint8_t *)part->weights + (size_t)(channel / LS_TILE) * bytes;
    for (int g = 0; g < inputs / LS_GROUP; g++) {
        const uint8_t *header, *group = ls_block_at(format, tile, g, &header);
        const uint8_t *codes = group + (k_format ? 2 * LS_TILE : 0);
        float minimum = ls_block_minimum(format, header, group, c);
        for (int k = 0; k < LS_GROUP; k++) {
            int code = ls_block_code(format, codes, c, k) - ls_block_offset(format);
            float weight = ls_block_scale(format, header, group, c, k) * (float)code;
            to[g * LS_GROUP + k] = ls_block_has_minima(format) ? weight + minimum : weight;
        }
    }
}

typedef struct {
    const ls_linear_part *part;
    int inputs, count;
    const int64_t *channels;
    float *to;
} rows_call;

static void rows_body(void *context, int thread, int threads) {
    const rows_call *r = context;
    int last = ls_share(r->count, thread + 1, threads);
    for (int i = ls_share(r->count, thread, threads); i < last; i++)
        ls_block_row(r->part, r->inputs, (int)r->channels[i], r->to + (size_t)i * (size_t)r->inputs);
}

/* to [count][inputs]: the weights of some channels. */
LS_API void ls_block_rows_at(const ls_linear_part *part, int32_t inputs, const int64_t *channels, int32_t count,
                             float *to, int32_t threads) {
    rows_call r = {part, inputs, count, channels, to};
    ls_parallel(rows_body, &r, threads, LS_SPIN_LAYER);
}
