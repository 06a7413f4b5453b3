/* Rows of 4-bit codes, and the features that they stand for. Part of every isa_*.c.
 *
 * A row is a run of blocks of LS_GROUP features: two float16, the step and the least feature, then a byte for each
 * feature of the first half, whose low bits are its code 0..15 and whose high bits are that of the second half. A
 * feature is step * code + least; the product is exact. */

#define BLOCK LS_BLOCK
#define NIBBLE_QUADS 5 /* fours of bytes of a block, of which the first is its two numbers */

INLINE int nibble_blocks(const ls_mixer *m) { return (m->width + LS_GROUP - 1) / LS_GROUP; }

/* what queries meet keys as: where some are rebuilt, all are floats */
INLINE int met_kind(const ls_mixer *m) { return m->rebuilt || m->chunk ? LS_F32 : m->row_kind; }
/* whether keys are codes there, so that queries become codes as well */
INLINE int has_codes(const ls_mixer *m) { return met_kind(m) == LS_INT8 || met_kind(m) == LS_INT4; }

/* the two halves of each lane as floats */
INLINE void widen_pairs(vli pairs, vl *low, vl *high) {
    vlh halves[2] = {__builtin_convertvector(pairs & 0xffff, vlh),
                     __builtin_convertvector((pairs >> 16) & 0xffff, vlh)};
    *low = load_features((const char *)halves, LS_F16);
    *high = load_features((const char *)(halves + 1), LS_F16);
}

/* ---- making them */

/* the nearest float16, and the float that it is */
INLINE uint16_t nearest_half(float x, float *as_float) {
    vl low, high;
    vli half = narrow_float16(vl_set1(x));
    widen_pairs(half, &low, &high);
    *as_float = low[0];
    return (uint16_t)half[0];
}

/* see ls_ops; what float16 cannot hold makes a block of NaN */
static void pack_nibbles(const float *x, int width, uint8_t *to) {
    for (int first = 0; first < width; first += LS_GROUP, to += 4 * NIBBLE_QUADS) {
        float part[LS_GROUP], most = x[first], fewest = most, step, least;
        uint8_t codes[LS_GROUP];
        /* the last feature again, which widens no block */
        for (int i = 0; i < LS_GROUP; i++) part[i] = x[first + i < width ? first + i : width - 1];
        for (int i = 1; i < LS_GROUP; i++) {
            most = part[i] > most ? part[i] : most;
            fewest = part[i] < fewest ? part[i] : fewest;
        }
        uint16_t numbers[2];
        numbers[1] = nearest_half(fewest, &least);
        float range = most - least;
        numbers[0] = nearest_half((range > 0.0f ? range : 0.0f) / 15.0f, &step);
        if (!__builtin_isfinite(largest_size(part, LS_GROUP)) || !__builtin_isfinite(step) || !__builtin_isfinite(least)) {
            memset(codes, 0, sizeof codes);
            numbers[0] = numbers[1] = 0x7e00;
        } else {
            float inverse = step > 0.0f ? 1.0f / step : 0.0f;
            if (!__builtin_isfinite(inverse)) inverse = 0.0f;
            for (int i = 0; i < LS_GROUP; i++) {
                float code = (part[i] - least) * inverse;
                code = code > 0.0f ? code : 0.0f;
                code = code < 15.0f ? code : 15.0f;
                codes[i] = (uint8_t)((int32_t)((code + 12582912.0f) - 12582912.0f));
            }
        }
        memcpy(to, numbers, sizeof numbers);
        for (int i = 0; i < LS_GROUP / 2; i++) to[4 + i] = (uint8_t)(codes[i] | codes[i + LS_GROUP / 2] << 4);
    }
}

/* ---- reading them */

/* As many fours of bytes as a vector has lanes; `there` are the bytes that may be read. */
INLINE vli load_fours(const char *at, int64_t there) {
    if (there >= (int64_t)sizeof(vli)) return vli_load(at);
    vli v = {0};
    if (there > 0) memcpy(&v, at, (size_t)there);
    return v;
}

/* Steps [blocks][2: step, least][BLOCK] and codes [quads][BLOCK][4] of `count` rows, zeros behind the last one as far
 * as a vector goes; ahead: bytes to rows that are prefetched. */
static void tile_nibbles(const char *rows, int64_t stride, int count, int blocks, int64_t ahead, uint8_t *tile,
                         float *steps) {
    const int32_t low = 0x0f0f0f0f;
    for (int row = 0; row < count; row += LS_LANES) {
        prefetch(rows + row * stride + ahead, LS_LANES * stride);
        for (int quad = 0; quad < NIBBLE_QUADS * blocks; quad += LS_LANES) {
            vli v[LS_LANES];
            for (int i = 0; i < LS_LANES; i++) {
                int64_t at = (row + i) * stride + 4 * quad;
                v[i] = load_fours(rows + at, count * stride - at);
            }
            transpose(v);
            for (int i = 0; i < LS_LANES && quad + i < NIBBLE_QUADS * blocks; i++) {
                int block = (quad + i) / NIBBLE_QUADS, part = (quad + i) % NIBBLE_QUADS - 1;
                if (part < 0) {
                    vl step, least;
                    widen_pairs(v[i], &step, &least);
                    vl_store(steps + 2 * block * BLOCK + row, step);
                    vl_store(steps + (2 * block + 1) * BLOCK + row, least);
                    continue;
                }
                vli first = v[i] & low, second = (v[i] >> 4) & low;
                uint8_t *to = tile + ((size_t)(LS_GROUP / 4 * block + part) * BLOCK + (size_t)row) * 4;
                memcpy(to, &first, sizeof first);
                memcpy(to + LS_GROUP / 2 * BLOCK, &second, sizeof second);
            }
        }
    }
}

#ifndef LS_LANES_BYTES
INLINE vli load_bytes(const char *at) {
    vli v = {0};
    for (int i = 0; i < LS_LANES; i++) v[i] = (uint8_t)at[i];
    return v;
}
#else
INLINE vli load_bytes(const char *at) { return LS_LANES_BYTES(at); }
#endif

/* one block as floats */
INLINE void widen_nibble_block(const char *block, float step, float least, float *to) {
    UNROLL(LS_PARTS, h) {
        vli both = load_bytes(block + 4 + h * LS_LANES);
        vl low = __builtin_convertvector(both & 15, vl), high = __builtin_convertvector(both >> 4, vl);
        vl_store(to + h * LS_LANES, LS_LANES_FMA(low, vl_set1(step), vl_set1(least)));
        vl_store(to + LS_GROUP / 2 + h * LS_LANES, LS_LANES_FMA(high, vl_set1(step), vl_set1(least)));
    }
}

/* as widen_kind */
static void widen_nibbles(const ls_mixer *m, const char *rows, int bytes, int count, int64_t ahead, float *to) {
    int blocks = nibble_blocks(m), padded = ls_up16(m->width), numbers = count * blocks;
    int32_t pairs[BLOCK * (LS_MAX_HEAD_WIDTH / LS_GROUP)];
    float steps[BLOCK * (LS_MAX_HEAD_WIDTH / LS_GROUP)], leasts[BLOCK * (LS_MAX_HEAD_WIDTH / LS_GROUP)];
    for (int i = 0; i < count; i++)
        for (int b = 0; b < blocks; b++)
            memcpy(pairs + i * blocks + b, rows + i * bytes + b * 4 * NIBBLE_QUADS, sizeof *pairs);
    for (int i = 0; i < numbers; i += LS_LANES) {
        vl step, least;
        widen_pairs(load_fours((const char *)(pairs + i), (numbers - i) * 4), &step, &least);
        vl_store(steps + i, step);
        vl_store(leasts + i, least);
    }
    for (int i = 0, n = 0; i < count; i++, rows += bytes, to += padded) {
        if (ahead) prefetch(rows + ahead, bytes);
        for (int b = 0; b < blocks; b++, n++) {
            const char *block = rows + b * 4 * NIBBLE_QUADS;
            if (LS_GROUP * (b + 1) <= padded) {
                widen_nibble_block(block, steps[n], leasts[n], to + LS_GROUP * b);
                continue;
            }
            float part[LS_GROUP];
            widen_nibble_block(block, steps[n], leasts[n], part);
            memcpy(to + LS_GROUP * b, part, sizeof(float) * (size_t)(padded - LS_GROUP * b));
        }
        for (int c = m->width; c < padded; c++) to[c] = 0.0f;
    }
}
