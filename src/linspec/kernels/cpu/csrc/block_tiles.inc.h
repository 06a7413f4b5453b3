/* Tiles of weights in blocks (blocks.h says how they lie), for sets whose registers hold LS_REGISTER
 * bytes: `bb` of codes, `bf` of floats. The including file defines
 *     LS_SLICES                     registers of channels that are multiplied at once
 *     LS_SIGNED(format)             whether codes are made signed; else sums start at -offset * sum of x
 *     block_dot(format, w, quads, x, stride, start)  start + products of codes and inputs, `quads` fours
 *     block_lookup(levels, codes), block_halves(p), block_bytes(p), block_fma(a, b, c)
 *
 * Sums of codes are exact. Floats are added in one order everywhere: group by group, scale before
 * minimum. A minimum leaves the loop over codes: it is multiplied by the sum of the group's inputs. */
#define REGISTERS (LS_LINE / LS_REGISTER)
#define CHANNELS (LS_REGISTER / 4) /* of a register */

INLINE bb block_load(const uint8_t *p) {
    bb v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* bytes shifted to the left (right where negative), of which `mask` is kept: what comes in from a
 * neighbour is not */
INLINE bb shifted(bb v, int left, uint8_t mask) {
    bh wide = (bh)v;
    wide = left > 0 ? wide << left : wide >> -left;
    return (bb)wide & mask;
}

/* eight fours of codes of the channels of register `slice` */
INLINE void block_codes(int format, const uint8_t *codes, int slice, bb *w) {
    int bits = ls_block_bits(format);
    const uint8_t *high = codes + slice * LS_REGISTER, *low = high + ls_block_high(format);
    bb high0 = {0}, high1 = {0};
    if (bits == 5 || bits == 6) high0 = block_load(high);
    if (bits == 6) high1 = block_load(high + LS_LINE);
    for (int q = 0; q < 4; q++) {
        bb both = block_load(low + q * LS_LINE);
        if (bits == 8) {
            w[q] = both;
            w[q + 4] = block_load(low + (q + 4) * LS_LINE);
            continue;
        }
        w[q] = both & 15;
        w[q + 4] = shifted(both, -4, 15);
        if (bits == 5) {
            w[q] |= shifted(high0, 4 - q, 16);
            w[q + 4] |= shifted(high0, -q, 16);
        }
        if (bits == 6) {
            w[q] |= shifted(high0, 4 - 2 * q, 48);
            w[q + 4] |= shifted(high1, 4 - 2 * q, 48);
        }
        if (format == LS_IQ4_NL) {
            w[q] = block_lookup(ls_levels, w[q]);
            w[q + 4] = block_lookup(ls_levels, w[q + 4]);
        }
    }
    if (LS_SIGNED(format))
        for (int q = 0; q < 8; q++) w[q] -= (uint8_t)ls_block_offset(format);
}

/* scales of the inputs 0-15 and 16-31, and minima */
INLINE void block_factors(int format, const uint8_t *header, const uint8_t *group, int slice,
                          bf *factors) {
    int at = slice * CHANNELS;
    factors[0] = block_halves(header + 2 * at);
    if (ls_block_has_minima(format)) factors[2] = block_halves(header + 2 * (LS_TILE + at));
    if (!ls_block_is_k(format)) return;
    bf second = block_bytes(group + LS_TILE + at);
    factors[1] = factors[0] * second;
    factors[0] *= block_bytes(group + at);
    if (ls_block_has_minima(format)) factors[2] = -factors[2] * second;
}

INLINE bf block_spread(float x) { return x - (bf){0}; }

/* sum += what one group gives for one of `rows` rows */
INLINE bf block_row(int format, const bb *w, const bf *factors, const int8_t *x, const int32_t *sums,
                    const float *scales, int rows, bf sum) {
    int offset = LS_SIGNED(format) ? 0 : ls_block_offset(format);
    bf scale = block_spread(scales[0]);
    if (format == LS_Q6_K) {
        bf first = block_dot(format, w, 4, x, rows, offset * sums[0]);
        bf second = block_dot(format, w + 4, 4, x + 16 * rows, rows, offset * sums[rows]);
        sum = block_fma(first, factors[0] * scale, sum);
        return block_fma(second, factors[1] * scale, sum);
    }
    bf dots = block_dot(format, w, 8, x, rows, offset * sums[2 * rows]);
    sum = block_fma(dots, factors[0] * scale, sum);
    if (!ls_block_has_minima(format)) return sum;
    return block_fma(factors[2], block_spread(scales[rows]), sum);
}

/* one group for all rows */
INLINE void block_group(int format, const uint8_t *header, const uint8_t *group, const int8_t *x,
                        const int32_t *sums, const float *scales, int rows, bf (*out)[REGISTERS]) {
    const uint8_t *codes = group + (ls_block_is_k(format) ? 2 * LS_TILE : 0);
    for (int line = 0; line < ls_block_group(format); line += 64)
        __builtin_prefetch((const char *)group + LS_BLOCKS_AHEAD + line);
    for (int first = 0; first < REGISTERS; first += LS_SLICES) {
        bb w[LS_SLICES][8];
        bf factors[LS_SLICES][3];
        for (int i = 0; i < LS_SLICES; i++) {
            block_codes(format, codes, first + i, w[i]);
            block_factors(format, header, group, first + i, factors[i]);
        }
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < LS_SLICES; i++)
                out[r][first + i] = block_row(format, w[i], factors[i], x + 4 * r, sums + r, scales + r,
                                              rows, out[r][first + i]);
    }
}

INLINE void block_rows(int format, const uint8_t *w, const ls_block_rows *x, int groups, int rows,
                       float *out) {
    bf sums[LS_ROWS][REGISTERS];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < REGISTERS; i++) sums[r][i] = (bf){0};
    for (int g = 0; g < groups; g++) {
        const uint8_t *header, *group = ls_block_at(format, w, g, &header);
        block_group(format, header, group, x->codes + (size_t)g * LS_GROUP * rows,
                    x->sums + (size_t)g * LS_BLOCK_SUMS * rows,
                    x->scales + (size_t)g * LS_BLOCK_SCALES * rows, rows, sums);
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < REGISTERS; i++)
            memcpy(out + r * LS_TILE + i * CHANNELS, &sums[r][i], sizeof sums[r][i]);
}

/* constants for a single row and for full blocks, so that steps between inputs are known */
INLINE void block_format(int format, const uint8_t *w, const ls_block_rows *x, int groups, int rows,
                         float *out) {
    if (rows == 1)
        block_rows(format, w, x, groups, 1, out);
    else if (rows == LS_ROWS)
        block_rows(format, w, x, groups, LS_ROWS, out);
    else
        block_rows(format, w, x, groups, rows, out);
}

static void block_tile(int format, const uint8_t *w, const ls_block_rows *x, int groups, int rows,
                       float *out) {
    switch (format) {
        case LS_Q8_0: block_format(LS_Q8_0, w, x, groups, rows, out); break;
        case LS_Q4_0: block_format(LS_Q4_0, w, x, groups, rows, out); break;
        case LS_Q4_1: block_format(LS_Q4_1, w, x, groups, rows, out); break;
        case LS_Q5_0: block_format(LS_Q5_0, w, x, groups, rows, out); break;
        case LS_Q5_1: block_format(LS_Q5_1, w, x, groups, rows, out); break;
        case LS_IQ4_NL: block_format(LS_IQ4_NL, w, x, groups, rows, out); break;
        case LS_Q4_K: block_format(LS_Q4_K, w, x, groups, rows, out); break;
        case LS_Q5_K: block_format(LS_Q5_K, w, x, groups, rows, out); break;
        case LS_Q6_K: block_format(LS_Q6_K, w, x, groups, rows, out); break;
    }
}
#undef REGISTERS
#undef CHANNELS
