/* Scores: the products of queries and keys. Part of every isa_*.c. */

/* the softmax of one query over some rows: the largest score, the sum of exponentials; no rows: -infinity and 0 */
typedef struct {
    float max, sum;
} softmax_state;

/* One query of one node, its output and its softmax. q: floats, with zeros up to whole sixteens. `codes` and what
 * follows: for rows of codes; offset for int8 rows, block_offsets of every 32 features for int4 rows. What is computed for
 * one query, and in which order, does not depend on the others. */
typedef struct {
    const float *q;
    float *out;
    softmax_state *state;
    const visible_rows *visible;
    const float *bias;
    int8_t *codes;
    int32_t offset;
    float scale;
    int32_t *block_offsets;
} query;

/* keys that are multiplied by `count` queries at once */
#define KEYS(count) (LS_LANES == 16 ? (count) == 1 ? 8 : 4 : (count) == 1 ? 4 : 2)

/* Dot products of some keys with some queries, sixteen partial sums each; one vector for each key and query. */
INLINE void dot_parts(const query *queries, int count, const char *const *keys, int rows, int width, int kind,
                      vl dots[][LS_LANES], int first) {
    vl sums[LS_QUERIES][8][LS_PARTS];
    UNROLL(count, j) UNROLL(rows, k) UNROLL(LS_PARTS, h) sums[j][k][h] = vl_set1(0.0f);
    for (int i = 0; i < width; i += 16)
        UNROLL(LS_PARTS, h) {
            vl key[8];
            UNROLL(rows, k) key[k] = load_features(keys[k] + (i + h * LS_LANES) * feature_bytes(kind), kind);
            UNROLL(count, j) {
                vl q = vl_load(queries[j].q + i + h * LS_LANES);
                UNROLL(rows, k) sums[j][k][h] = LS_LANES_FMA(q, key[k], sums[j][k][h]);
            }
        }
    UNROLL(count, j) UNROLL(rows, k) dots[j][first + k] = vl_folded(sums[j][k]);
}

/* Scores of floats, a vector of keys at a time; behind the last key they are copies of its own. */
INLINE void score_floats(const row_block *rows, const query *queries, int count, int width, int kind,
                         float scores[][BLOCK]) {
    for (int first = 0; first < rows->count; first += LS_LANES) {
        const char *keys[LS_LANES];
        vl dots[LS_QUERIES][LS_LANES];
        for (int k = 0; k < LS_LANES; k++) {
            int row = first + k < rows->count ? first + k : rows->count - 1;
            keys[k] = rows->keys + row * rows->key_stride;
            if (rows->fresh) prefetch(keys[k] + rows->key_ahead, rows->key_stride);
        }
        for (int k = 0; k < LS_LANES; k += KEYS(count))
            dot_parts(queries, count, keys + k, KEYS(count), width, kind, dots, k);
        UNROLL(count, j) vl_store(scores[j] + first, vl_sums(dots[j]));
    }
}

/* Scores of codes, without the scales of the queries: `parts` vectors of keys at a time, whose sums do not wait for
 * each other. */
INLINE void score_codes(const row_block *rows, const query *queries, int count, int quads, float scores[][BLOCK]) {
    const int parts = count == 1 ? 4 : count == 2 ? 2 : 1;
    for (int first = 0; first < rows->count; first += parts * LS_LANES) {
        const uint8_t *codes = rows->codes + 4 * first;
        vli sums[LS_QUERIES][4];
        UNROLL(count, j) UNROLL(parts, k) sums[j][k] = (vli){0} + (LS_DOT_FLIP ? queries[j].offset : 0);
        for (int q = 0; q < quads; q++, codes += 4 * BLOCK) {
            vli keys[4];
            UNROLL(parts, k) keys[k] = vli_load(codes + 4 * LS_LANES * k);
            UNROLL(count, j) {
                int32_t four;
                memcpy(&four, queries[j].codes + 4 * q, sizeof four);
                UNROLL(parts, k) sums[j][k] = LS_DOT(sums[j][k], keys[k], (vli){0} + four);
            }
        }
        UNROLL(parts, k) {
            int at = first + k * LS_LANES;
            vl scales = vl_load(rows->key_scales + at);
            UNROLL(count, j) vl_store(scores[j] + at, __builtin_convertvector(sums[j][k], vl) * scales);
        }
    }
}

/* of the codes of a query in one block of features: the offset is that times -8 */
INLINE float sum_of_codes(const query *q, int block) { return -0.125f * (float)q->block_offsets[block]; }

/* The same for int4 rows, block by block of their features: a step times the product of the codes, and the least
 * feature times the sum of the codes of the query. */
INLINE void score_nibbles(const row_block *rows, const query *queries, int count, int blocks, float scores[][BLOCK]) {
    const int parts = count == 1 ? 4 : count == 2 ? 2 : 1;
    for (int first = 0; first < rows->count; first += parts * LS_LANES) {
        const uint8_t *codes = rows->codes + 4 * first;
        const float *steps = rows->key_steps + first;
        vl totals[LS_QUERIES][4];
        UNROLL(count, j) UNROLL(parts, k) totals[j][k] = vl_set1(0.0f);
        for (int b = 0; b < blocks; b++, steps += 2 * BLOCK) {
            vli sums[LS_QUERIES][4];
            UNROLL(count, j) UNROLL(parts, k) sums[j][k] = (vli){0};
            for (int q = 0; q < LS_GROUP / 4; q++, codes += 4 * BLOCK) {
                vli keys[4];
                UNROLL(parts, k) keys[k] = vli_load(codes + 4 * LS_LANES * k);
                UNROLL(count, j) {
                    int32_t four;
                    memcpy(&four, queries[j].codes + LS_GROUP * b + 4 * q, sizeof four);
                    UNROLL(parts, k) sums[j][k] = LS_DOT(sums[j][k], keys[k], (vli){0} + four);
                }
            }
            UNROLL(parts, k) {
                vl step = vl_load(steps + k * LS_LANES), least = vl_load(steps + BLOCK + k * LS_LANES);
                UNROLL(count, j) {
                    vl sum = vl_set1(sum_of_codes(queries + j, b));
                    totals[j][k] = LS_LANES_FMA(__builtin_convertvector(sums[j][k], vl), step, totals[j][k]);
                    totals[j][k] = LS_LANES_FMA(sum, least, totals[j][k]);
                }
            }
        }
        UNROLL(count, j) UNROLL(parts, k) vl_store(scores[j] + first + k * LS_LANES, totals[j][k]);
    }
}

/* scores [count][BLOCK] of all rows of a block; what is behind the last row is anything */
INLINE void score_rows(const ls_mixer *m, const row_block *rows, const query *queries, int count,
                       float scores[][BLOCK]) {
    int width = ls_up16(m->width);
    if (met_kind(m) == LS_INT8)
        score_codes(rows, queries, count, (m->width + 3) / 4, scores);
    else if (met_kind(m) == LS_INT4)
        score_nibbles(rows, queries, count, nibble_blocks(m), scores);
    else if (rows->key_kind == LS_F32)
        score_floats(rows, queries, count, width, LS_F32, scores);
    else if (rows->key_kind == LS_BF16)
        score_floats(rows, queries, count, width, LS_BF16, scores);
    else
        score_floats(rows, queries, count, width, LS_F16, scores);
}

/* scores s to cap tanh(s scale / cap), in place; those of rows that are not there stay -inf */
static void cap_scores(float *scores, float scale, float cap) {
    for (int i = 0; i < BLOCK; i += LS_LANES) {
        vl s = vl_load(scores + i) * vl_set1(scale);
        vl_store(scores + i, vl_select((vli)(s > vl_set1(-__builtin_inff())), vl_capped(s, cap), s));
    }
}

/* scores to exponentials, in place; returns the softmax over these rows alone */
INLINE softmax_state to_exponentials(float *scores, float scale) {
    vl most = vl_set1(-__builtin_inff()), total[LS_PARTS];
    for (int i = 0; i < BLOCK; i += LS_LANES) {
        vl s = vl_load(scores + i) * vl_set1(scale);
        vl_store(scores + i, s);
        most = vl_max(s, most);
    }
    float max = vl_largest(most);
    UNROLL(LS_PARTS, h) total[h] = vl_set1(0.0f);
    for (int i = 0; i < BLOCK; i += 16)
        UNROLL(LS_PARTS, h) {
            vl e = vl_exp(vl_load(scores + i + h * LS_LANES) - vl_set1(max));
            vl_store(scores + i + h * LS_LANES, e);
            total[h] += e;
        }
    return (softmax_state){max, vl_sum(vl_folded(total))};
}

/* scores to squares of what is positive, in place; -inf weighs nothing either way */
INLINE void square(float *scores) {
    for (int i = 0; i < BLOCK; i += LS_LANES) {
        vl positive = vl_max(vl_load(scores + i), vl_set1(0.0f));
        vl_store(scores + i, positive * positive);
    }
}
