/* Rows of an int8 cache: codes and a scale. Part of every isa_*.c.
 *
 * A row is `width` codes, rounded up to whole fours with zeros, and then a float: the scale. Queries
 * become codes too. 32 rows are then what 32 output channels are to a linear layer, so once their
 * codes lie as those of a tile do, the product of an int8 layer gives the scores: the same integers on
 * every instruction set, and the cost of one dot product a row and query. */

static void int8_tile(const uint8_t *w, const int8_t *x, const int32_t *offsets, int quads,
                      int rows, float *out);

#ifdef LS_WIDE_SHUFFLES
#define LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define EACH_OF_EIGHT _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++)

/* to[i] lane j = from[j] lane i: four times, halves are shuffled like a pack of cards */
INLINE void transpose(vi *v) {
    vi w[16];
    for (int round = 0; round < 2; round++) {
        EACH_OF_EIGHT {
            w[2 * i] = SHUFFLE(v[i], v[i + 8], LOWER);
            w[2 * i + 1] = SHUFFLE(v[i], v[i + 8], UPPER);
        }
        EACH_OF_EIGHT {
            v[2 * i] = SHUFFLE(w[i], w[i + 8], LOWER);
            v[2 * i + 1] = SHUFFLE(w[i], w[i + 8], UPPER);
        }
    }
}

/* sixteen rows and sixteen fours of codes of each: the same as by fours */
INLINE void tile_square(const char *rows, int64_t stride, uint8_t *tile) {
    vi v[16];
    for (int i = 0; i < 16; i++) memcpy(v + i, rows + i * stride, sizeof *v);
    transpose(v);
    for (int i = 0; i < 16; i++) {
        vi fours = v[i] ^ (int32_t)0x80808080;
        memcpy(tile + (size_t)i * 128, &fours, sizeof fours);
    }
}
#endif

/* `count` rows into a tile: [quads][32][4] of code + 128 */
static void tile_rows(const char *rows, int64_t stride, int count, int quads, uint8_t *tile) {
    int done = 0;
#ifdef LS_WIDE_SHUFFLES
    if (quads % 16 == 0)
        for (; done + 16 <= count; done += 16)
            for (int q = 0; q < quads; q += 16)
                tile_square(rows + done * stride + 4 * q, stride, tile + (q * 32 + done) * 4);
#endif
    for (int i = done; i < count; i++)
        for (int q = 0; q < quads; q++) {
            uint32_t four;
            memcpy(&four, rows + i * stride + 4 * q, sizeof four);
            four ^= 0x80808080u;
            memcpy(tile + (size_t)(q * 32 + i) * 4, &four, sizeof four);
        }
}

/* exact, in whatever order: |codes| <= 127 and at most LS_MAX_HEAD_WIDTH of them */
INLINE int32_t dot_int8(const int8_t *a, const int8_t *b, int count) {
    int32_t sum = 0;
    for (int i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

/* the codes of some queries side by side, as a block of rows of a layer */
INLINE void tile_queries(const query *queries, int count, int quads, int8_t *codes,
                        int32_t *offsets) {
    for (int j = 0; j < count; j++) {
        offsets[j] = queries[j].offset;
        for (int q = 0; q < quads; q++)
            memcpy(codes + (size_t)(q * count + j) * 4, queries[j].codes + 4 * q, 4);
    }
}

/* scores without the queries' scales; -inf behind the last row that is seen */
static void score_int8(const block *b, int count, const int8_t *codes, const int32_t *offsets,
                        float scores[][BLOCK]) {
    const ls_mixer *m = b->m;
    int quads = (m->width + 3) / 4;
    for (int first = 0; first < BLOCK; first += LS_TILE) {
        _Alignas(64) uint8_t tile[LS_MAX_HEAD_WIDTH / 4 * 128];
        _Alignas(64) float sums[LS_ROWS * LS_TILE], scales[LS_TILE] = {0};
        int n = b->shared - first < LS_TILE ? b->shared - first : LS_TILE;
        for (int j = 0; j < count; j++)
            for (int i = 0; i < LS_TILE; i += 16)
                vf_store(scores[j] + first + i, vf_set1(-__builtin_inff()));
        if (n <= 0) continue;
        const char *rows = b->keys + (int64_t)(b->from + first) * m->row_bytes;
        tile_rows(rows, m->row_bytes, n, quads, tile);
        for (int i = 0; i < n; i++) {
            scales[i] = row_scale(rows, i, m);
            for (int c = 0; b->first_touch && c < m->width; c += 64)
                prefetch(rows + (int64_t)(i + BLOCK) * m->row_bytes, c, 1);
        }
        int8_tile(tile, codes, offsets, quads, count, sums);
        for (int j = 0; j < count; j++)
            for (int i = 0; i < n; i++)
                scores[j][first + i] = sums[j * LS_TILE + i] * scales[i];
    }
}

static void attend_block_int8(const block *b, const query *queries, int count) {
    const ls_mixer *m = b->m;
    int quads = (m->width + 3) / 4;
    _Alignas(64) float scores[LS_ROWS][BLOCK];
    _Alignas(64) int8_t codes[LS_ROWS * LS_MAX_HEAD_WIDTH];
    int32_t offsets[LS_ROWS];
    float scales[BLOCK];
    tile_queries(queries, count, quads, codes, offsets);
    score_int8(b, count, codes, offsets, scores);
    for (int j = 0; j < count; j++) {
        int32_t indices[BLOCK];
        int own = own_rows(b, queries + j, indices);
        for (int i = 0; i < own; i++) {
            const int8_t *key = (const int8_t *)b->keys + (int64_t)indices[i] * m->row_bytes;
            float dot = (float)dot_int8(queries[j].codes, key, m->width);
            scores[j][b->shared + i] = dot * row_scale(b->keys, indices[i], m);
        }
    }
    for (int i = 0; i < BLOCK; i++)
        scales[i] = i < b->shared ? row_scale(b->values, b->from + i, m) : 1.0f;
    apply_weights(b, queries, count, scores, scales);
}
