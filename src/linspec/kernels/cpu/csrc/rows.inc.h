/* Rows of a cache as the loops over them want them: floats, keys and values alike, and the keys of int8 rows as a
 * tile of codes. What has to be made is made once for all queries. Part of every isa_*.c. */

#define BLOCK LS_BLOCK

/* rows of one kv head, `count` of them. keys and values: of the kinds that are named, whole sixteens of features with
 * zeros at the end. codes [quads][BLOCK][4] and key_scales: in place of `keys` for int8 rows, whose values have scales
 * as well. */
typedef struct {
    int count, fresh; /* fresh: nobody has read them yet, so who does prefetches the block behind them */
    const char *ahead;  /* the values behind them */
    int64_t key_ahead;  /* bytes to the keys behind them */
    const char *keys, *values;
    int64_t key_stride, value_stride;
    int key_kind, value_kind;
    uint8_t *codes;
    float key_scales[BLOCK], value_scales[BLOCK];
} row_block;

/* the scale at the end of an int8 row */
INLINE float row_scale(const char *row, const ls_mixer *m) {
    float scale;
    memcpy(&scale, row + m->row_bytes - 4, sizeof scale);
    return scale;
}

/* `parts` vectors of features of a row */
INLINE void widen_parts(const char *at, int kind, int parts, float *to) {
    UNROLL(parts, i)
        vl_store(to + LS_LANES * i, load_features(at + LS_LANES * i * feature_bytes(kind), kind));
}

/* `count` rows as floats, zeros behind each up to whole sixteens; ahead: bytes to rows that are prefetched, or 0 */
INLINE void widen_kind(const ls_mixer *m, const char *rows, int count, int kind, int64_t ahead,
                       float *to) {
    int size = feature_bytes(kind), whole = m->width & ~15, padded = ls_up16(m->width);
    for (int i = 0; i < count; i++, rows += m->row_bytes, to += padded) {
        int c = 0;
        if (ahead) prefetch(rows + ahead, m->row_bytes);
        for (; c + 64 <= m->width; c += 64) widen_parts(rows + c * size, kind, 4 * LS_PARTS, to + c);
        for (; c < whole; c += 16) widen_parts(rows + c * size, kind, LS_PARTS, to + c);
        if (whole == m->width) continue;
        char part[64] = {0};
        memcpy(part, rows + whole * size, (size_t)((m->width - whole) * size));
        widen_parts(part, kind, LS_PARTS, to + whole);
    }
}

static void widen_rows(const ls_mixer *m, const char *rows, int count, int64_t ahead, float *to) {
    switch (m->row_kind) {
        case LS_F32: widen_kind(m, rows, count, LS_F32, ahead, to); break;
        case LS_BF16: widen_kind(m, rows, count, LS_BF16, ahead, to); break;
        case LS_F16: widen_kind(m, rows, count, LS_F16, ahead, to); break;
        default: widen_kind(m, rows, count, LS_INT8, ahead, to);
    }
}

/* Rows for loops over them: where they are, or else as floats in `space`. A few queries widen as they go; more of
 * them shall not do so again and again. */
INLINE const char *ready(const ls_mixer *m, const char *rows, int count, int few, int64_t ahead, float *space,
                         int *kind, int64_t *stride) {
    *kind = m->row_kind;
    *stride = m->row_bytes;
    if (m->width % 16 == 0 && (few || m->row_kind == LS_F32)) return rows;
    widen_rows(m, rows, count, ahead, space);
    *kind = LS_F32;
    *stride = ls_up16(m->width) * (int64_t)sizeof *space;
    return (const char *)space;
}

/* to[i] lane j = from[j] lane i, for as many vectors as a vector has lanes */
#if LS_LANES == 16
#define LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
/* four times, halves are shuffled like a pack of cards */
INLINE void transpose(vli *v) {
    vli w[16];
    for (int round = 0; round < 2; round++) {
        UNROLL(8, i) {
            w[2 * i] = LANE_SHUFFLE(v[i], v[i + 8], LOWER);
            w[2 * i + 1] = LANE_SHUFFLE(v[i], v[i + 8], UPPER);
        }
        UNROLL(8, i) {
            v[2 * i] = LANE_SHUFFLE(w[i], w[i + 8], LOWER);
            v[2 * i + 1] = LANE_SHUFFLE(w[i], w[i + 8], UPPER);
        }
    }
}
#elif LS_LANES == 8
/* within neighbouring fours first, as 256-bit registers shuffle those at once */
INLINE void transpose(vli *v) {
    vli w[8];
    UNROLL(4, i) {
        w[2 * i] = LANE_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        w[2 * i + 1] = LANE_SHUFFLE(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    vli x[8];
    UNROLL(2, i) {
        UNROLL(2, k) {
            x[4 * i + 2 * k] = LANE_SHUFFLE(w[4 * i + k], w[4 * i + 2 + k], 0, 1, 8, 9, 4, 5, 12, 13);
            x[4 * i + 2 * k + 1] = LANE_SHUFFLE(w[4 * i + k], w[4 * i + 2 + k], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    UNROLL(4, i) {
        v[i] = LANE_SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        v[i + 4] = LANE_SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
#endif

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

/* Make `count` rows from `first` on ready for few queries or for many, those from `then` on being the next; space:
 * ls_block_floats. */
static void read_rows(const ls_mixer *m, const char *keys, const char *values, int first, int count, int then, int few,
                      float *space, row_block *to) {
    const char *next = row_address(m, keys, m->page_keys, then);
    keys = row_address(m, keys, m->page_keys, first);
    int64_t key_ahead = next - keys;
    to->ahead = row_address(m, values, m->page_values, then);
    values = row_address(m, values, m->page_values, first);
    to->count = count;
    to->fresh = 1;
    to->values = ready(m, values, count, few, 0, space + BLOCK * ls_up16(m->width), &to->value_kind,
                       &to->value_stride);
    if (m->row_kind != LS_INT8) {
        to->keys = ready(m, keys, count, few, key_ahead, space, &to->key_kind, &to->key_stride);
        to->key_ahead = to->keys == keys ? key_ahead : BLOCK * to->key_stride;
        return;
    }
    to->codes = (uint8_t *)space;
    tile_rows(keys, m->row_bytes, count, (m->width + 3) / 4, key_ahead, to->codes);
    for (int i = 0; i < count; i++) {
        to->key_scales[i] = row_scale(keys + i * m->row_bytes, m);
        to->value_scales[i] = row_scale(values + i * m->row_bytes, m);
    }
    for (int i = count; i < BLOCK; i++) to->key_scales[i] = to->value_scales[i] = 0.0f;
}
