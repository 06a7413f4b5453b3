/* Many queries over a block of rows: each has a lane. Part of every isa_*.c.
 *
 * Where few queries read rows, the lanes are features, and have to be added up for every row and query. Where there are
 * as many queries as lanes, rows are read feature by feature, and nothing is shuffled. Every sum has the parts that it has
 * there, added up in the same order, so that a query gets the bits that it would get alone. */

/* keys that are multiplied by a vector of queries at once */
#define LANE_KEYS (LS_LANES == 16 ? 4 : 2)

/* The products of queries and keys feature by feature; q: [width][LS_LANES] */
typedef struct {
    const float *q, *key[LANE_KEYS];
    int width;
} feature_pairs;

/* the partial sums of the features that are `part` apart from a multiple of 16 */
INLINE void one_part(const feature_pairs *p, int part, vl *to) {
    UNROLL(LANE_KEYS, k) to[k] = vl_set1(0.0f);
    for (int c = part; c < p->width; c += 16) {
        vl q = vl_load(p->q + c * LS_LANES);
        UNROLL(LANE_KEYS, k) to[k] = LS_LANES_FMA(q, vl_set1(p->key[k][c]), to[k]);
    }
}

/* parts that meet as in vl_sums: first those that are eight apart, last neighbours */
#define MEETING(name, of, apart)                                \
    INLINE void name(const feature_pairs *p, int part, vl *to) { \
        vl other[LANE_KEYS];                                    \
        of(p, part, to);                                        \
        of(p, part + apart, other);                             \
        UNROLL(LANE_KEYS, k) to[k] += other[k];                 \
    }
MEETING(two_parts, one_part, 8)
MEETING(four_parts, two_parts, 4)
MEETING(eight_parts, four_parts, 2)
MEETING(all_parts, eight_parts, 1)

INLINE void score_width(const row_block *rows, const float *q, int width, float (*scores)[LS_LANES]) {
    for (int first = 0; first < rows->count; first += LANE_KEYS) {
        feature_pairs p = {.q = q, .width = width};
        vl dots[LANE_KEYS];
        UNROLL(LANE_KEYS, k) {
            int row = first + k < rows->count ? first + k : rows->count - 1;
            p.key[k] = (const float *)(rows->keys + row * rows->key_stride);
        }
        all_parts(&p, 0, dots);
        UNROLL(LANE_KEYS, k) vl_store(scores[first + k], dots[k]);
    }
}

/* scores of floats; usual widths are constants */
static void score_lanes(const row_block *rows, const float *q, int width, float (*scores)[LS_LANES]) {
    switch (width) {
        case 64: score_width(rows, q, 64, scores); break;
        case 128: score_width(rows, q, 128, scores); break;
        default: score_width(rows, q, width, scores);
    }
}

/* sums += four codes of neighbouring keys . those of the queries */
INLINE void dot_codes(const uint8_t *codes, vli fours, vli *sums) {
    UNROLL(LANE_KEYS, k) {
        int32_t key;
        memcpy(&key, codes + 4 * k, sizeof key);
        sums[k] = LS_DOT(sums[k], (vli){0} + key, fours);
    }
}

/* scores of codes, without the scales of the queries; q: [quads][LS_LANES] fours of codes */
static void score_lane_codes(const row_block *rows, const int32_t *q, vli offsets, int quads, float (*scores)[LS_LANES]) {
    for (int first = 0; first < rows->count; first += LANE_KEYS) {
        vli sums[LANE_KEYS];
        UNROLL(LANE_KEYS, k) sums[k] = offsets;
        const uint8_t *codes = rows->codes + 4 * first;
        for (int i = 0; i < quads; i++, codes += 4 * BLOCK) dot_codes(codes, vli_load(q + i * LS_LANES), sums);
        UNROLL(LANE_KEYS, k)
            vl_store(scores[first + k], __builtin_convertvector(sums[k], vl) * vl_set1(rows->key_scales[first + k]));
    }
}

/* The same for int4 rows, as in score_nibbles; sums [blocks][LS_LANES]: of the codes of the queries. */
static void score_lane_nibbles(const row_block *rows, const int32_t *q, const float *sums, int blocks,
                               float (*scores)[LS_LANES]) {
    for (int first = 0; first < rows->count; first += LANE_KEYS) {
        const uint8_t *codes = rows->codes + 4 * first;
        const float *steps = rows->key_steps + first;
        const int32_t *fours = q;
        vl totals[LANE_KEYS];
        UNROLL(LANE_KEYS, k) totals[k] = vl_set1(0.0f);
        for (int b = 0; b < blocks; b++, steps += 2 * BLOCK) {
            vli dots[LANE_KEYS];
            vl sum = vl_load(sums + b * LS_LANES);
            UNROLL(LANE_KEYS, k) dots[k] = (vli){0};
            for (int i = 0; i < LS_GROUP / 4; i++, codes += 4 * BLOCK, fours += LS_LANES)
                dot_codes(codes, vli_load(fours), dots);
            UNROLL(LANE_KEYS, k) {
                totals[k] = LS_LANES_FMA(__builtin_convertvector(dots[k], vl), vl_set1(steps[k]), totals[k]);
                totals[k] = LS_LANES_FMA(sum, vl_set1(steps[BLOCK + k]), totals[k]);
            }
        }
        UNROLL(LANE_KEYS, k) vl_store(scores[first + k], totals[k]);
    }
}

/* of a vector of queries */
typedef struct {
    vl max, sum;
} softmax_lanes;

/* scores to exponentials, as `cap_scores` and `to_exponentials` do it */
INLINE softmax_lanes lanes_to_exponentials(int count, vl scale, float cap, float (*scores)[LS_LANES]) {
    vl most = vl_set1(-__builtin_inff()), parts[16];
    UNROLL(16, h) parts[h] = vl_set1(0.0f);
    for (int i = 0; i < count; i++) {
        vl s = vl_load(scores[i]) * scale;
        if (cap > 0.0f) s = vl_select((vli)(s > vl_set1(-__builtin_inff())), vl_capped(s, cap), s);
        vl_store(scores[i], s);
        most = vl_max(s, most);
    }
    for (int i = 0; i < count; i++) {
        vl e = vl_exp(vl_load(scores[i]) - most);
        vl_store(scores[i], e);
        parts[i % 16] += e;
    }
    for (int n = 8; n; n /= 2)
        for (int h = 0; h < n; h++) parts[h] += parts[h + n];
    return (softmax_lanes){most, parts[0]};
}

/* as `join_states`; how sums join goes to `to` */
INLINE void join_lanes(const query *queries, softmax_lanes later, accumulator *to) {
    float max[LS_LANES], sum[LS_LANES], keep[LS_LANES], scale[LS_LANES];
    for (int j = 0; j < LS_LANES; j++) max[j] = queries[j].state->max, sum[j] = queries[j].state->sum;
    vl before = vl_load(max), total = vl_load(sum), most = vl_select((vli)(before > later.max), before, later.max);
    vl kept = vl_exp(before - most), scaled = vl_exp(later.max - most);
    vli begins = (vli)(total == vl_set1(0.0f));
    vl_store(keep, kept);
    vl_store(scale, scaled);
    vl_store(max, vl_select(begins, later.max, most));
    vl_store(sum, vl_select(begins, later.sum, total * kept + later.sum * scaled));
    for (int j = 0; j < LS_LANES; j++) {
        to[j] = (accumulator){queries[j].out, NULL, queries[j].state->sum == 0.0f ? BEGIN : JOIN, keep[j], scale[j]};
        *queries[j].state = (softmax_state){max[j], sum[j]};
    }
}

/* scores of rows of every kind */
INLINE void score_all_lanes(const ls_mixer *m, const row_block *rows, const query *queries, const float *turned,
                            float (*scores)[LS_LANES]) {
    const int32_t *fours = (const int32_t *)turned;
    if (met_kind(m) == LS_INT8) {
        int32_t offsets[LS_LANES];
        for (int j = 0; j < LS_LANES; j++) offsets[j] = LS_DOT_FLIP ? queries[j].offset : 0;
        score_lane_codes(rows, fours, vli_load(offsets), (m->width + 3) / 4, scores);
    } else if (met_kind(m) == LS_INT4) {
        float sums[LS_MAX_HEAD_WIDTH / LS_GROUP][LS_LANES];
        for (int b = 0; b < nibble_blocks(m); b++)
            for (int j = 0; j < LS_LANES; j++) sums[b][j] = sum_of_codes(queries + j, b);
        score_lane_nibbles(rows, fours, sums[0], nibble_blocks(m), scores);
    } else {
        score_lanes(rows, turned, ls_up16(m->width), scores);
    }
}

/* LS_LANES queries over a block; turned: they, feature by feature or by fours of codes */
static void attend_lanes(const block *b, const query *queries, const float *turned) {
    const ls_mixer *m = b->m;
    const row_block *rows = &b->rows;
    float scores[BLOCK + LANE_KEYS][LS_LANES] __attribute__((aligned(64)));
    float factors[LS_LANES];
    accumulator to[LS_LANES];
    score_all_lanes(m, b->whole ? rows : &b->rebuilt, queries, turned, scores);
    for (int j = 0; j < LS_LANES; j++) factors[j] = score_scale(m, queries + j);
    join_lanes(queries, lanes_to_exponentials(rows->count, vl_load(factors), m->score_cap, scores), to);
    for (int i = 0; m->row_kind == LS_INT8 && i < rows->count; i++)
        vl_store(scores[i], vl_load(scores[i]) * vl_set1(rows->value_scales[i]));
    source all = {rows->values, NULL, rows->value_stride, LS_F32, rows->count, ls_up16(m->width),
                  rows->fresh ? rows->ahead : NULL, m->value_bytes};
    for (int j = 0, n; j < LS_LANES; j += n) {
        n = next_of(LS_LANES - j);
        for (int i = 0; i < n; i++) to[j + i].weights = &scores[0][j + i];
        accumulate_lanes(&all, to + j, n);
        all.ahead = NULL;
    }
}

/* Whether queries of a block may take lanes: all see the same of its rows, and nothing but those counts. */
INLINE int fits_lanes(const block *b) {
    const ls_mixer *m = b->m;
    if (b->any_own || !b->shared || m->bias || m->squared_relu || b->rows.value_kind != LS_F32) return 0;
    if (b->rebuilt.count) return !b->whole;
    return has_codes(m) || b->rows.key_kind == LS_F32;
}

/* A vector of queries after the other, feature by feature. */
static void turn_queries(const ls_mixer *m, const query *queries, int count, float *to) {
    int columns = has_codes(m) ? LS_GROUP / 4 * nibble_blocks(m) : ls_up16(m->width);
    for (int i = 0; i < count; i++) {
        float *at = to + i / LS_LANES * LS_LANES * ls_up16(m->width) + i % LS_LANES;
        /* floats, or fours of codes that are as large */
        for (int c = 0; c < columns; c++) memcpy(at + c * LS_LANES, queries[i].q + c, sizeof *at);
    }
}

/* As many of the queries as fill whole vectors; returns how many. */
static int attend_many(block *b, const query *queries, int count) {
    int whole = count / LS_LANES * LS_LANES;
    if (!whole || !fits_lanes(b)) return 0;
    if (b->turned_of != queries || b->turned_count < whole) {
        turn_queries(b->m, queries, whole, b->turned);
        b->turned_of = queries, b->turned_count = whole;
    }
    for (int i = 0; i < whole; i += LS_LANES) {
        attend_lanes(b, queries + i, b->turned + i * ls_up16(b->m->width));
        b->rows.fresh = 0;
    }
    return whole;
}
