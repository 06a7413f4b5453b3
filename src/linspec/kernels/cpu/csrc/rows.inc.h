/* Rows of a cache as the loops over them want them: floats, keys and values alike, and the keys of int8 and int4 rows
 * as a tile of codes. What has to be made is made once for all queries. Part of every isa_*.c. */

/* rows of one kv head, `count` of them. keys and values: of the kinds that are named, whole sixteens of features with
 * zeros at the end. codes [quads][BLOCK][4] and key_scales: in place of `keys` for int8 rows, whose values have scales
 * as well; for int4 rows codes and key_steps, see nibbles.inc.h, and values are floats. */
typedef struct {
    int count, fresh; /* fresh: nobody has read them yet, so who does prefetches the block behind them */
    const char *ahead;  /* the values behind them */
    int64_t key_ahead;  /* bytes to the keys behind them */
    const char *keys, *values;
    int64_t key_stride, value_stride;
    int key_kind, value_kind;
    uint8_t *codes;
    float *key_steps;
    float key_scales[BLOCK], value_scales[BLOCK];
} row_block;

/* the scale at the end of an int8 row of so many bytes */
INLINE float row_scale(const char *row, int bytes) {
    float scale;
    memcpy(&scale, row + bytes - 4, sizeof scale);
    return scale;
}

/* `parts` vectors of features of a row */
INLINE void widen_parts(const char *at, int kind, int parts, float *to) {
    UNROLL(parts, i)
        vl_store(to + LS_LANES * i, load_features(at + LS_LANES * i * feature_bytes(kind), kind));
}

/* `count` rows of `bytes` as floats, zeros behind each up to whole sixteens; ahead: bytes to rows that are prefetched, or 0 */
INLINE void widen_kind(const ls_mixer *m, const char *rows, int bytes, int count, int kind, int64_t ahead,
                       float *to) {
    int size = feature_bytes(kind), whole = m->width & ~15, padded = ls_up16(m->width);
    for (int i = 0; i < count; i++, rows += bytes, to += padded) {
        int c = 0;
        if (ahead) prefetch(rows + ahead, bytes);
        for (; c + 64 <= m->width; c += 64) widen_parts(rows + c * size, kind, 4 * LS_PARTS, to + c);
        for (; c < whole; c += 16) widen_parts(rows + c * size, kind, LS_PARTS, to + c);
        if (whole == m->width) continue;
        char part[64] = {0};
        memcpy(part, rows + whole * size, (size_t)((m->width - whole) * size));
        widen_parts(part, kind, LS_PARTS, to + whole);
    }
}

static void widen_rows(const ls_mixer *m, const char *rows, int bytes, int count, int64_t ahead, float *to) {
    switch (m->row_kind) {
        case LS_F32: widen_kind(m, rows, bytes, count, LS_F32, ahead, to); break;
        case LS_BF16: widen_kind(m, rows, bytes, count, LS_BF16, ahead, to); break;
        case LS_F16: widen_kind(m, rows, bytes, count, LS_F16, ahead, to); break;
        case LS_INT4: widen_nibbles(m, rows, bytes, count, ahead, to); break;
        default: widen_kind(m, rows, bytes, count, LS_INT8, ahead, to);
    }
}

/* Rows for loops over them: where they are, or else as floats in `space`. A few queries widen as they go; more of
 * them shall not do so again and again. */
INLINE const char *ready(const ls_mixer *m, const char *rows, int bytes, int count, int few, int64_t ahead,
                         float *space, int *kind, int64_t *stride) {
    *kind = m->row_kind;
    *stride = bytes;
    if (m->width % 16 == 0 && m->row_kind != LS_INT4 && (few || m->row_kind == LS_F32)) return rows;
    widen_rows(m, rows, bytes, count, ahead, space);
    *kind = LS_F32;
    *stride = ls_up16(m->width) * (int64_t)sizeof *space;
    return (const char *)space;
}

/* as many rows as a vector has lanes, and as many fours of codes of each */
#if LS_LANES >= 8
INLINE void tile_square(const char *rows, int64_t stride, uint8_t *tile) {
    vli v[LS_LANES];
    for (int i = 0; i < LS_LANES; i++) v[i] = vli_load(rows + i * stride);
    transpose(v);
    for (int i = 0; i < LS_LANES; i++) {
        vli fours = v[i] ^ (int32_t)LS_DOT_FLIP;
        memcpy(tile + (size_t)i * BLOCK * 4, &fours, sizeof fours);
    }
}
#endif

/* The codes of `count` rows as [quads][BLOCK][4], as LS_DOT wants them; ahead: bytes to rows that are prefetched. */
static void tile_rows(const char *rows, int64_t stride, int count, int quads, int64_t ahead, uint8_t *tile) {
    int row = 0, quad = 0;
    (void)ahead; /* narrow sets do not prefetch */
#if LS_LANES >= 8
    for (; row + LS_LANES <= count; row += LS_LANES) {
        prefetch(rows + row * stride + ahead, LS_LANES * stride);
        for (quad = 0; quad + LS_LANES <= quads; quad += LS_LANES)
            tile_square(rows + row * stride + 4 * quad, stride, tile + (quad * BLOCK + row) * 4);
    }
#endif
    for (int i = 0; i < count; i++)
        for (int q = i < row ? quad : 0; q < quads; q++) {
            uint32_t four;
            memcpy(&four, rows + i * stride + 4 * q, sizeof four);
            four ^= (uint32_t)LS_DOT_FLIP;
            memcpy(tile + (size_t)(q * BLOCK + i) * 4, &four, sizeof four);
        }
}

/* `count` keys as the floats that they stand for; see widen_kind */
static void widen_keys(const ls_mixer *m, const char *rows, int count, int64_t ahead, float *to) {
    int padded = ls_up16(m->width);
    widen_rows(m, rows, m->row_bytes, count, ahead, to);
    for (int i = 0; m->row_kind == LS_INT8 && i < count; i++, to += padded) {
        vl scale = vl_set1(row_scale(rows + i * m->row_bytes, m->row_bytes));
        for (int c = 0; c < padded; c += LS_LANES) vl_store(to + c, vl_load(to + c) * scale);
    }
}

/* Such floats are the keys of a block. */
static void use_keys(const ls_mixer *m, const float *keys, int count, row_block *to) {
    to->count = count;
    to->keys = (const char *)keys;
    to->key_kind = LS_F32;
    to->key_stride = ls_up16(m->width) * (int64_t)sizeof *keys;
}

/* bytes from the key at `first` to the one that is read next */
INLINE int64_t bytes_ahead(const ls_mixer *m, const char *keys, int first, int then) {
    return key_address(m, keys, then) - key_address(m, keys, first);
}

static void read_keys(const ls_mixer *m, const char *keys, int first, int count, int then, int few, float *space,
                      row_block *to) {
    int64_t ahead = bytes_ahead(m, keys, first, then);
    keys = key_address(m, keys, first);
    if (!has_codes(m)) {
        /* keys that are rebuilt have no scales beside them */
        if (m->row_kind == LS_INT8) {
            widen_keys(m, keys, count, ahead, space);
            use_keys(m, space, count, to);
        } else {
            to->keys = ready(m, keys, m->row_bytes, count, few, ahead, space, &to->key_kind, &to->key_stride);
        }
        to->key_ahead = to->keys == keys ? ahead : BLOCK * to->key_stride;
        return;
    }
    to->codes = (uint8_t *)space;
    if (m->row_kind == LS_INT4) {
        to->key_steps = space + BLOCK * nibble_blocks(m) * (LS_GROUP / sizeof *space);
        tile_nibbles(keys, m->row_bytes, count, nibble_blocks(m), ahead, to->codes, to->key_steps);
        return;
    }
    tile_rows(keys, m->row_bytes, count, (m->width + 3) / 4, ahead, to->codes);
    for (int i = 0; i < BLOCK; i++) to->key_scales[i] = i < count ? row_scale(keys + i * m->row_bytes, m->row_bytes) : 0.0f;
}

/* space: of a block of rows, whose second half is that of values */
static void read_values(const ls_mixer *m, const char *values, int first, int count, int then, int few, float *space,
                        row_block *to) {
    to->ahead = value_address(m, values, then);
    values = value_address(m, values, first);
    to->values = ready(m, values, m->value_bytes, count, few, 0, space + BLOCK * ls_up16(m->width), &to->value_kind,
                       &to->value_stride);
    for (int i = 0; m->row_kind == LS_INT8 && i < BLOCK; i++)
        to->value_scales[i] = i < count ? row_scale(values + i * m->value_bytes, m->value_bytes) : 0.0f;
}

/* Make `count` rows from `first` on ready for few queries or for many, those from `then` on being the next; keys and
 * values: null where they are not read. space: ls_block_floats */
static void read_rows(const ls_mixer *m, const char *keys, const char *values, int first, int count, int then, int few,
                      float *space, row_block *to) {
    to->count = count;
    to->fresh = 1;
    if (values) read_values(m, values, first, count, then, few, space, to);
    if (keys) read_keys(m, keys, first, count, then, few, space, to);
}
