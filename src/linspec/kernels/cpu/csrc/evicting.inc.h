/* Rows that stay of closed groups, under one softmax with those within the span. Part of every isa_*.c.
 *
 * A kept row is a key, a value, and what it is worth; 0 where there is none. Those that are not there come first, the others
 * in the order of their positions. Keys of the state have the queries of their token behind them: when a group closes,
 * its queries weigh the rows that were kept and those of the group up to their own, and that decides who stays. Groups that
 * close on the path to a node do so for it alone, from the rows of that path, with the same bits as when they close for good. */

/* the first of the kept rows that is there; m->budget if none is */
static int first_kept(const ls_mixer *m) {
    int low = 0, high = m->budget;
    while (low < high) {
        int middle = (low + high) / 2;
        if (m->kept[(int64_t)middle * kept_columns(m) + 2 * m->width] > 0.0f) high = middle;
        else low = middle + 1;
    }
    return low;
}

/* The block that begins `begin` rows behind the first kept one: a state of these rows alone, which all queries see. */
static void attend_kept(block *b, query *queries, int begin) {
    const ls_mixer *m = b->m;
    const char *keys = b->keys, *values = b->values;
    const visible_rows *near = queries->visible;
    visible_rows all = {.count = m->budget, .first = first_kept(m)};
    int repeats = m->heads / m->kv_heads, count = m->nodes * repeats;
    ls_mixer kept = *m;
    kept.committed = m->budget;
    kept.staged = kept.paged = 0;
    kept.row_bytes = kept.value_bytes = (int32_t)sizeof(float) * kept_columns(m);
    b->m = &kept, b->keys = (const char *)m->kept, b->values = (const char *)(m->kept + m->width);
    for (int i = 0; i < count; i++) queries[i].visible = &all;
    attend_rows(b, queries, count, begin);
    for (int i = 0; i < count; i++) queries[i].visible = near + i / repeats;
    b->m = m, b->keys = keys, b->values = values;
}

/* ---- a group closes */

/* `rows` rows that compete: kept ones from number `first` on, then those of the group. The rest lies in scratch. keys
 * [rows][padded]; weighed [rows][16]: by the queries whose number has this remainder; worth [rows] */
typedef struct {
    const ls_mixer *m;
    int first, kept, rows, padded;
    float *keys, *weighed, *worth, *scores, *turned;
    int32_t *dropped;
} contest;

static contest contest_of(const ls_mixer *m, float *scratch) {
    contest c = {.m = m, .first = first_kept(m), .padded = ls_up16(m->width)};
    c.kept = m->budget - c.first;
    c.rows = c.kept + (int)m->group;
    c.keys = scratch;
    c.weighed = c.keys + (size_t)c.rows * (size_t)c.padded;
    c.worth = c.weighed + (size_t)c.rows * 16;
    c.scores = c.worth + 2 * (size_t)c.rows;
    c.turned = c.scores + ((size_t)c.rows + LANE_KEYS) * LS_LANES;
    c.dropped = (int32_t *)(c.turned + (size_t)c.padded * LS_LANES);
    return c;
}

INLINE const float *kept_row(const contest *c, int row) {
    return c->m->kept + (int64_t)(c->first + row) * kept_columns(c->m);
}

/* the key of row i of the group, whose rows are those of `indices` or follow each other from `at` on */
INLINE int64_t group_row(int at, const int32_t *indices, int i) { return indices ? indices[i] : at + i; }
INLINE const float *group_key(const ls_mixer *m, int64_t row) { return (const float *)(m->keys + row * m->row_bytes); }

static void gather_keys(const contest *c, int at, const int32_t *indices) {
    const ls_mixer *m = c->m;
    memset(c->keys, 0, sizeof(float) * (size_t)c->rows * (size_t)c->padded);
    for (int i = 0; i < c->rows; i++) {
        const float *key = i < c->kept ? kept_row(c, i) : group_key(m, group_row(at, indices, i - c->kept));
        memcpy(c->keys + (size_t)i * (size_t)c->padded, key, sizeof *key * (size_t)m->width);
    }
}

/* Let LS_LANES queries from number `from` on weigh the rows: those of the last `asked` rows of the group. */
static void weigh_lanes(const contest *c, int from, int at, const int32_t *indices) {
    const ls_mixer *m = c->m;
    int repeats = m->heads / m->kv_heads, silent = (int)m->group - m->asked, count = m->asked * repeats - from;
    float (*scores)[LS_LANES] = (float (*)[LS_LANES])c->scores, share[LS_LANES] = {0};
    row_block rows = {.count = c->rows, .keys = (const char *)c->keys, .key_stride = c->padded * (int64_t)sizeof(float)};
    memset(c->turned, 0, sizeof(float) * (size_t)c->padded * LS_LANES);
    for (int j = 0; j < LS_LANES && j < count; j++) {
        int row = silent + (from + j) / repeats;
        const float *q = group_key(m, group_row(at, indices, row)) + ((from + j) % repeats + 1) * m->width;
        for (int i = 0; i < m->width; i++) c->turned[i * LS_LANES + j] = q[i];
    }
    score_lanes(&rows, c->turned, c->padded, scores);
    for (int j = 0; j < LS_LANES && j < count; j++)
        for (int i = c->kept + silent + (from + j) / repeats + 1; i < c->rows; i++) scores[i][j] = -__builtin_inff();
    softmax_lanes of = lanes_to_exponentials(c->rows, vl_set1(m->score_scale), m->score_cap, scores);
    for (int j = 0; j < LS_LANES && j < count; j++) share[j] = 1.0f / of.sum[j];
    for (int i = 0; i < c->rows; i++) {
        float *to = c->weighed + 16 * (size_t)i + from % 16;
        vl_store(to, vl_load(to) + vl_load(scores[i]) * vl_load(share));
    }
}

/* what every row is worth then */
static void judge_rows(const contest *c) {
    const ls_mixer *m = c->m;
    int columns = kept_columns(m), beside = m->pool / 2;
    float *sums = c->worth + c->rows;
    for (int i = 0; i < c->rows; i++) sums[i] = vf_sum(vf_load(c->weighed + 16 * (size_t)i));
    for (int i = 0; i < c->rows; i++) {
        if (!m->pool) {
            c->worth[i] = (i < c->kept ? kept_row(c, i)[columns - 1] : 1.0f) + sums[i];
            continue;
        }
        float most = 0.0f;
        for (int k = i < beside ? 0 : i - beside; k <= i + beside && k < c->rows; k++) most = sums[k] > most ? sums[k] : most;
        c->worth[i] = 1.0f + most;
    }
}

/* Mark those that have to go, of equal ones the later ones, by a worth of -1. */
static void drop_rows(const contest *c) {
    int drop = c->rows - c->m->budget;
    float *backwards = c->worth + c->rows;
    if (drop <= 0) return;
    for (int i = 0; i < c->rows; i++) backwards[i] = -c->worth[c->rows - 1 - i];
    ls_top_k(backwards, c->rows, drop, c->dropped);
    for (int i = 0; i < drop; i++) c->worth[c->rows - 1 - c->dropped[i]] = -1.0f;
}

/* the rows that stay, at the end of `to`, which may be where they come from */
static void move_rows(const contest *c, int at, const int32_t *indices, float *to) {
    const ls_mixer *m = c->m;
    int columns = kept_columns(m), missing = m->budget > c->rows ? m->budget - c->rows : 0;
    size_t bytes = sizeof *to * (size_t)m->width;
    memset(to, 0, sizeof *to * (size_t)missing * (size_t)columns);
    to += (int64_t)missing * columns;
    for (int i = 0; i < c->rows; i++) {
        if (c->worth[i] < 0.0f) continue;
        if (i < c->kept) {
            memmove(to, kept_row(c, i), 2 * bytes);
        } else {
            int64_t row = group_row(at, indices, i - c->kept);
            memcpy(to, group_key(m, row), bytes);
            memcpy(to + m->width, m->values + row * m->value_bytes, bytes);
        }
        to[columns - 1] = c->worth[i];
        to += columns;
    }
}

/* What is kept once a group has closed, whose rows are those of `indices` or follow each other from `at` on; scratch:
 * ls_close_floats */
static void close_group(const ls_mixer *m, int at, const int32_t *indices, float *to, float *scratch) {
    contest c = contest_of(m, scratch);
    gather_keys(&c, at, indices);
    memset(c.weighed, 0, sizeof(float) * (size_t)c.rows * 16);
    for (int from = 0; from < m->asked * (m->heads / m->kv_heads); from += LS_LANES) weigh_lanes(&c, from, at, indices);
    judge_rows(&c);
    drop_rows(&c);
    move_rows(&c, at, indices, to);
}

/* see ls_ops */
static void close_groups(const ls_mixer *m, int first, int last, float *kept, float *scratch) {
    ls_mixer so_far = *m;
    so_far.kept = kept;
    for (int row = first; row < last; row += (int)m->group) close_group(&so_far, row, NULL, kept, scratch);
}

/* ---- groups that close on the path to a node */

/* whether two nodes close the same groups */
static int close_alike(const ls_mixer *m, const visible_rows *a, const visible_rows *b) {
    int own = a->first - m->committed;
    return a->first == b->first && (own <= 0 || memcmp(a->ancestors, b->ancestors, (size_t)own) == 0);
}

/* see ls_ops */
static const float *close_on_path(const ls_mixer *m, int node, int *last, ls_closings *c) {
    visible_rows v, other;
    ls_mixer so_far = *m;
    int group = (int)m->group, changed = 0;
    find_visible(m, node, &v);
    for (*last = node + 1; *last < m->nodes; ++*last) {
        find_visible(m, *last, &other);
        if (!close_alike(m, &v, &other)) break;
    }
    if (m->kept_next && v.first == m->next_summed) return m->kept_next;
    for (int g = 0; m->summed + g * group < v.first; g++) {
        int32_t *path = c->paths + g * group;
        float *to = c->kept + (size_t)g * ls_kept_floats(m);
        for (int i = 0; i < group; i++) {
            int row = row_at(m, &v, m->summed + g * group + i);
            changed |= row != path[i];
            path[i] = row;
        }
        if (changed) close_group(&so_far, 0, path, to, c->scratch);
        so_far.kept = to;
    }
    return so_far.kept;
}
