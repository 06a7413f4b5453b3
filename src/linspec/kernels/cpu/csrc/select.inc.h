/* Attention to the groups that a node selects ahead of its span, and to the span. Part of every isa_*.c.
 *
 * Groups are judged by two-bit keys (codes.inc.h) or by bounds; those with most are read, of equal ones the first: by
 * all query heads of a kv head alike, and whatever else is in the step.
 *
 * A *page* is LS_JUDGED rows here. Its bounds are its greatest and its least keys, feature by feature, as bfloat16
 * rounded away from each other. No key of the page has a greater product with q than the sum of the products of its
 * features with those of the greatest keys where they are positive and of the least keys where they are not. A group has
 * the greatest of these of its pages and of the query heads of the kv head.
 *
 * LS_JUDGED pages lie side by side, as lanes: [LS_JUDGED pages][2: greatest, least][width][LS_JUDGED]. */

/* the bfloat16 next to x that is not below it (above = 1), or not above it (above = 0) */
INLINE uint16_t away(float x, int above) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits >> 31) != (uint32_t)above) bits += 0xffff;
    return (uint16_t)(bits >> 16);
}

/* LS_JUDGED rows from `first` on, as the floats that they stand for: [LS_JUDGED][whole sixteens of features] */
static void plain_rows(const ls_mixer *m, int64_t first, float *rows) {
    widen_keys(m, key_address(m, m->keys, first), LS_JUDGED, 0, rows);
}

/* The greatest and the least of LS_JUDGED rows, feature by feature, and of what `greatest` and `least` hold. */
static void join_extremes(const float *rows, int padded, float *greatest, float *least) {
    for (int c = 0; c < padded; c += LS_LANES) {
        vl most = vl_load(greatest + c), fewest = vl_load(least + c);
        for (int i = 0; i < LS_JUDGED; i++) {
            vl x = vl_load(rows + i * padded + c);
            most = vl_max(most, x);
            fewest = vl_select((vli)(x < fewest), x, fewest);
        }
        vl_store(greatest + c, most);
        vl_store(least + c, fewest);
    }
}

static void begin_extremes(int padded, float *greatest, float *least) {
    for (int c = 0; c < padded; c++) greatest[c] = -__builtin_inff(), least[c] = __builtin_inff();
}

/* see ls_ops */
static void bound_pages(const ls_mixer *m, int first, int last) {
    float rows[LS_JUDGED * LS_MAX_HEAD_WIDTH], most[LS_MAX_HEAD_WIDTH], fewest[LS_MAX_HEAD_WIDTH];
    int padded = ls_up16(m->width);
    for (int page = first; page < last; page++) {
        uint16_t *greatest = m->judge + page / LS_JUDGED * ls_judge_numbers(m) + page % LS_JUDGED;
        uint16_t *least = greatest + m->width * LS_JUDGED;
        plain_rows(m, (int64_t)page * LS_JUDGED, rows);
        begin_extremes(padded, most, fewest);
        join_extremes(rows, padded, most, fewest);
        for (int c = 0; c < m->width; c++) {
            greatest[c * LS_JUDGED] = away(most[c], 1);
            least[c * LS_JUDGED] = away(fewest[c], 0);
        }
    }
}

/* Of LS_JUDGED pages the greatest bound over `count` queries (a constant), where it is greater than `most`. */
INLINE void judge_some(const ls_mixer *m, const uint16_t *bounds, const float *q, int count, float *most) {
    vl sums[LS_QUERIES][LS_PARTS];
    int padded = ls_up16(m->width);
    const uint16_t *least = bounds + m->width * LS_JUDGED;
    UNROLL(count, j) UNROLL(LS_PARTS, h) sums[j][h] = vl_set1(0.0f);
    for (int c = 0; c < m->width; c++)
        UNROLL(count, j) {
            float x = q[j * padded + c];
            const uint16_t *at = (x > 0.0f ? bounds : least) + c * LS_JUDGED;
            UNROLL(LS_PARTS, h) {
                vl bound = load_features((const char *)(at + h * LS_LANES), LS_BF16);
                sums[j][h] = LS_LANES_FMA(vl_set1(x), bound, sums[j][h]);
            }
        }
    UNROLL(count, j) UNROLL(LS_PARTS, h)
        vl_store(most + h * LS_LANES, vl_max(sums[j][h], vl_load(most + h * LS_LANES)));
}

/* the same over the queries of a node */
static void judge(const ls_mixer *m, const uint16_t *bounds, const float *q, float *most) {
    for (int i = 0; i < LS_JUDGED; i++) most[i] = -__builtin_inff();
    for (int n, left = m->heads / m->kv_heads; left; left -= n, q += n * ls_up16(m->width)) {
        n = next_of(left);
        switch (n) {
            case 1: judge_some(m, bounds, q, 1, most); break;
            case 2: judge_some(m, bounds, q, 2, most); break;
            case 3: judge_some(m, bounds, q, 3, most); break;
#if LS_QUERIES > 3
            case 4: judge_some(m, bounds, q, 4, most); break;
#endif
        }
    }
}

/* How many groups a node selects from; 0 where it reads all that there are. */
INLINE int judged_groups(const ls_mixer *m, const visible_rows *v) {
    int far = v->first / (int)m->group;
    return far > m->chosen ? far : 0;
}

#include "codes.inc.h"

/* Raise the greatest bound of a group, for each node; pages: where LS_JUDGED of them lie, from number `page` on. */
static void judge_bounds(const ls_mixer *m, const query *queries, const float *q, int page, int groups, float *to) {
    int each = (int)m->group / LS_JUDGED, repeats = m->heads / m->kv_heads;
    const uint16_t *bounds = m->judge + page / LS_JUDGED * ls_judge_numbers(m);
    float most[LS_JUDGED];
    for (int n = 0; n < m->nodes; n++, to += groups) {
        int pages = judged_groups(m, queries[n * repeats].visible) * each;
        if (page >= pages) continue;
        judge(m, bounds, q + n * repeats * ls_up16(m->width), most);
        for (int i = 0; i < LS_JUDGED && page + i < pages; i++) {
            float *group = to + (page + i) / each;
            if (most[i] > *group) *group = most[i];
        }
    }
}

/* What each of the first `groups` groups has, by the judge: to [nodes][groups], for as many as a node selects from; q:
 * the queries of all nodes. */
static void judge_groups(const ls_mixer *m, const query *queries, const float *q, int groups, float *to) {
    for (int i = 0; i < m->nodes * groups; i++) to[i] = -__builtin_inff();
    if (m->coded)
        for (int page = 0; page < groups * (int)m->group / LS_PAGE; page++) judge_codes(m, queries, q, page, groups, to);
    else
        for (int page = 0; page < groups * (int)m->group / LS_JUDGED; page += LS_JUDGED)
            judge_bounds(m, queries, q, page, groups, to);
}

/* The queries of all nodes as floats, as they meet the keys, with zeros up to whole sixteens. */
static void plain_queries(const ls_mixer *m, const query *queries, float *to) {
    int padded = ls_up16(m->width);
    memset(to, 0, sizeof *to * ls_query_count(m) * (size_t)padded);
    for (size_t i = 0; i < ls_query_count(m); i++, to += padded)
        for (int c = 0; c < m->width; c++)
            to[c] = has_codes(m) ? (float)queries[i].codes[c] * queries[i].scale : queries[i].q[c];
}

/* Who sees each group: bit n of seen[group] is node n. space: plain queries, then what groups have for each node, and
 * numbers of groups */
static void select_groups(const ls_mixer *m, const query *queries, uint64_t *seen, float *space) {
    int repeats = m->heads / m->kv_heads, groups = 0;
    float *judged = space + ls_query_count(m) * (size_t)ls_up16(m->width);
    for (int n = 0; n < m->nodes; n++) {
        int some = judged_groups(m, queries[n * repeats].visible);
        if (some > groups) groups = some;
    }
    int32_t *chosen = (int32_t *)(judged + m->nodes * groups);
    if (groups) {
        plain_queries(m, queries, space);
        judge_groups(m, queries, space, groups, judged);
    }
    for (int n = 0; n < m->nodes; n++, queries += repeats, judged += groups) {
        const visible_rows *v = queries->visible;
        int far = v->first / (int)m->group, some = judged_groups(m, v);
        if (some) ls_top_k(judged, some, m->chosen, chosen);
        for (int i = 0; i < (some ? m->chosen : far); i++) seen[some ? chosen[i] : i] |= 1ull << n;
        for (int i = far; i <= (v->count - 1) / m->group; i++) seen[i] |= 1ull << n;
    }
}

/* A block of rows, for the nodes that see its group; some: room for their queries. */
static void attend_group(block *b, const query *queries, uint64_t nodes, int from, query *some) {
    int repeats = b->m->heads / b->m->kv_heads, count = 0;
    for (; nodes; nodes &= nodes - 1)
        for (int r = 0; r < repeats; r++) some[count++] = queries[__builtin_ctzll(nodes) * repeats + r];
    b->turned_of = NULL; /* others stood in the same place */
    attend_rows(b, some, count, from - some->visible->first);
}

/* the group behind group `i` that some node sees, or the one behind all */
static int next_seen(const uint64_t *seen, int i, int groups) {
    for (i++; i < groups && !seen[i];) i++;
    return i;
}

/* see ls_ops; chunks are those of all rows, so that no bit of a node depends on what others select */
static void attend_selected(const ls_mixer *m, const float *q, int64_t q_stride, float *partial, float *more,
                            void *scratch) {
    size_t floats = ls_query_count(m) * (size_t)ls_up16(m->width), bytes = sizeof(float) * LS_QUERY_FLOATS * ls_query_count(m);
    int group = (int)m->group, groups = (m->committed + m->staged) / group + 1, chunk = -1;
    float *space = (float *)ls_up64((uintptr_t)scratch), *sum = NULL;
    float *turned = space + ls_read_floats(m), *plain = turned + floats;
    query *queries = (query *)(plain + floats);
    query *some = (query *)ls_up64((uintptr_t)queries + bytes);
    uint64_t *seen = (uint64_t *)ls_up64((uintptr_t)some + bytes);
    prepare_queries(m, 0, q, q_stride, queries, plain);
    memset(seen, 0, sizeof *seen * (size_t)groups);
    select_groups(m, queries, seen, (float *)(seen + groups));
    block b = {.m = m, .keys = m->keys, .values = m->values, .space = space, .turned = turned};
    for (int i = 0; i < groups; i++)
        for (int from = i * group; seen[i] && from < (i + 1) * group; from += BLOCK) {
            b.then = from + BLOCK < (i + 1) * group ? from + BLOCK : next_seen(seen, i, groups) * group;
            if (from / LS_CHUNK != chunk) {
                if (sum == more) merge_partials(m, partial, more);
                chunk = from / LS_CHUNK;
                sum = sum ? more : partial;
                begin_partial(m, sum, queries);
            }
            attend_group(&b, queries, seen[i], from, some);
        }
    if (sum == more) merge_partials(m, partial, more);
}
