/* Groups judged by keys of two bits. Part of every isa_*.c.
 *
 * A *page* is LS_PAGE rows here. It keeps its greatest and least keys, feature by feature, as bfloat16 rounded away from
 * each other, and where between them each key is, in thirds: code 0 is the least, 3 the greatest. A page has the
 * greatest product of a query with one of its keys as they are decoded, and a group the greatest of these of its pages
 * and of the query heads of the kv head.
 *
 * Products with codes are whole numbers: of the query, each feature times the page's third, 127 steps to its largest.
 * So neither their order nor the instruction set says what is selected; quantization/two_bit.py computes the same bits.
 *
 * One behind the other: [2: greatest, least][whole sixteens of features], and codes [sixteens][LS_PAGE][4 bytes]: bits 2 s
 * of byte j are the code of feature 4 s + j of the sixteen. */

typedef struct {
    float least[LS_MAX_HEAD_WIDTH], third[LS_MAX_HEAD_WIDTH]; /* third: a third of the way to the greatest */
    const uint8_t *codes;
} coded_page;

INLINE uint8_t *codes_of(const ls_mixer *m, uint16_t *page) { return (uint8_t *)(page + 2 * ls_up16(m->width)); }

/* The codes of LS_JUDGED rows, which become the rows from `first` on of a page. */
static void code_rows(const float *rows, int padded, const float *least, const float *inverse, int first, uint8_t *to) {
    for (int i = 0; i < LS_JUDGED; i++, rows += padded)
        for (int c = 0; c < padded; c += 16) {
            uint8_t line[16];
            uint32_t fours[4];
            for (int k = 0; k < 16; k += LS_LANES) {
                vl x = (vl_load(rows + c + k) - vl_load(least + c + k)) * vl_load(inverse + c + k);
                /* a feature that is the same in all rows is not a number here, and then 0 */
                x = vl_min(vl_max(x, vl_set1(0.0f)), vl_set1(3.0f)) + vl_set1(12582912.0f);
                vli code = vli_bits(x) - vli_bits(vl_set1(12582912.0f));
                UNROLL(LS_LANES, j) line[k + j] = (uint8_t)code[j];
            }
            memcpy(fours, line, sizeof line);
            fours[0] |= fours[1] << 2 | fours[2] << 4 | fours[3] << 6;
            memcpy(to + (c / 16 * LS_PAGE + first + i) * 4, fours, 4);
        }
}

/* see ls_ops */
static void code_pages(const ls_mixer *m, int first, int last) {
    float rows[LS_JUDGED * LS_MAX_HEAD_WIDTH], most[LS_MAX_HEAD_WIDTH], fewest[LS_MAX_HEAD_WIDTH];
    int padded = ls_up16(m->width);
    for (int page = first; page < last; page++) {
        uint16_t *at = m->judge + page * ls_judge_numbers(m);
        int64_t row = (int64_t)page * LS_PAGE;
        begin_extremes(padded, most, fewest);
        for (int i = 0; i < LS_PAGE; i += LS_JUDGED) {
            plain_rows(m, row + i, rows);
            join_extremes(rows, padded, most, fewest);
        }
        for (int c = 0; c < padded; c++) at[c] = away(most[c], 1), at[padded + c] = away(fewest[c], 0);
        for (int c = 0; c < padded; c += LS_LANES) {
            vl least = widen_bfloat16((const char *)(at + padded + c));
            vl_store(fewest + c, least);
            vl_store(most + c, vl_set1(3.0f) / (widen_bfloat16((const char *)(at + c)) - least));
        }
        for (int i = 0; i < LS_PAGE; i += LS_JUDGED) {
            plain_rows(m, row + i, rows);
            code_rows(rows, padded, fewest, most, i, codes_of(m, at));
        }
    }
}

/* Make a page ready for queries. */
static void read_codes(const ls_mixer *m, uint16_t *page, coded_page *to) {
    int padded = ls_up16(m->width);
    to->codes = codes_of(m, page);
    for (int c = 0; c < padded; c += LS_LANES) {
        vl greatest = widen_bfloat16((const char *)(page + c));
        vl least = widen_bfloat16((const char *)(page + padded + c));
        vl_store(to->least + c, least);
        vl_store(to->third + c, (greatest - least) * vl_set1(1.0f / 3.0f));
    }
}

/* What a query is to the codes of a page, in `to`; returns its product with the least keys. */
INLINE float meet_codes(const coded_page *page, const float *q, int padded, query *to) {
    float steps[LS_MAX_HEAD_WIDTH];
    vl sums[LS_PARTS];
    UNROLL(LS_PARTS, h) sums[h] = vl_set1(0.0f);
    for (int c = 0; c < padded; c += 16)
        UNROLL(LS_PARTS, h) {
            vl x = vl_load(q + c + h * LS_LANES);
            sums[h] += x * vl_load(page->least + c + h * LS_LANES);
            vl_store(steps + c + h * LS_LANES, x * vl_load(page->third + c + h * LS_LANES));
        }
    to->scale = quantize_row(steps, padded, (padded + 31) & ~31, 1, 0, to->codes, &to->offset);
    return vl_sum(vl_folded(sums));
}

/* The greatest products of `count` queries (a constant) with the codes of a key: whole numbers below 2^24. */
INLINE void dot_two_bits(const uint8_t *codes, int padded, const query *queries, int count, float *greatest) {
    vl most[LS_QUERIES];
    UNROLL(count, j) most[j] = vl_set1(-__builtin_inff());
    for (int i = 0; i < LS_PAGE; i += LS_LANES) {
        vli sums[LS_QUERIES][2];
        UNROLL(count, j) UNROLL(2, k) sums[j][k] = (vli){0};
        for (int c = 0; c < padded; c += 16) {
            vli fours = vli_load(codes + (c / 16 * LS_PAGE + i) * 4);
            UNROLL(4, s) {
                vli keys = fours >> (2 * s) & 0x03030303;
                UNROLL(count, j) {
                    int32_t four;
                    memcpy(&four, queries[j].codes + c + 4 * s, sizeof four);
                    sums[j][s % 2] = LS_DOT(sums[j][s % 2], keys, (vli){0} + four);
                }
            }
        }
        UNROLL(count, j) most[j] = vl_max(most[j], __builtin_convertvector(sums[j][0] + sums[j][1], vl));
    }
    UNROLL(count, j) greatest[j] = vl_largest(most[j]);
}

/* The greatest product of `count` queries (a constant) with keys of a page. */
INLINE float judge_coded(const coded_page *page, const float *q, int padded, int count) {
    int8_t codes[LS_QUERIES][LS_MAX_HEAD_WIDTH];
    float least[LS_QUERIES], dots[LS_QUERIES], greatest = -__builtin_inff();
    query queries[LS_QUERIES];
    for (int j = 0; j < count; j++) {
        queries[j].codes = codes[j];
        least[j] = meet_codes(page, q + j * padded, padded, queries + j);
    }
    dot_two_bits(page->codes, padded, queries, count, dots);
    for (int j = 0; j < count; j++) {
        float product = dots[j] * queries[j].scale + least[j];
        if (product > greatest) greatest = product;
    }
    return greatest;
}

/* the same over the queries of a node */
static float judge_page(const ls_mixer *m, const coded_page *page, const float *q) {
    int padded = ls_up16(m->width);
    float greatest = -__builtin_inff(), product = greatest;
    for (int n, left = m->heads / m->kv_heads; left; left -= n, q += n * padded) {
        n = next_of(left);
        switch (n) {
            case 1: product = judge_coded(page, q, padded, 1); break;
            case 2: product = judge_coded(page, q, padded, 2); break;
            case 3: product = judge_coded(page, q, padded, 3); break;
#if LS_QUERIES > 3
            case 4: product = judge_coded(page, q, padded, 4); break;
#endif
        }
        if (product > greatest) greatest = product;
    }
    return greatest;
}

/* As judge_bounds, of one page. */
static void judge_codes(const ls_mixer *m, const query *queries, const float *q, int page, int groups, float *to) {
    int each = (int)m->group / LS_PAGE, repeats = m->heads / m->kv_heads;
    coded_page coded;
    read_codes(m, m->judge + page * ls_judge_numbers(m), &coded);
    for (int n = 0; n < m->nodes; n++, to += groups) {
        if (page >= judged_groups(m, queries[n * repeats].visible) * each) continue;
        float product = judge_page(m, &coded, q + n * repeats * ls_up16(m->width));
        float *group = to + page / each;
        if (product > *group) *group = product;
    }
}
