/* Positions that nodes select, and attention to them: every kind of row, a tree whose groups close. Part of proof.c. */

enum { POSITIONS = 150, FAR_GROUP = 16 };

static case_of listing_case(int kind, int width) {
    case_of c = make_case(kind, width, 0, 0, 0, TAPS, RANDOM);
    c.m.heads = QUERY_HEADS / KV, c.m.kv_heads = 1;
    c.m.far_group = FAR_GROUP, c.m.far_span = 1, c.m.positions = POSITIONS;
    c.m.list_stride = POSITIONS + 1;
    return c;
}

/* lists of all nodes */
static int32_t *selected_positions(const ls_ops *ops, ls_mixer m, const float *q) {
    int32_t *lists = need(sizeof *lists * NODES * (POSITIONS + 1));
    void *scratch = (m.selects = 1, need(ls_positions_scratch_bytes(&m)));
    m.lists = lists;
    ops->select_positions(&m, q, m.heads * m.width, scratch);
    free(scratch);
    return lists;
}

static float *attended_lists(const ls_ops *ops, ls_mixer m, int32_t *lists, const float *q) {
    int stride = m.heads * m.width;
    float *sum = need(ls_partial_floats(&m) * sizeof *sum), *out = need(sizeof *out * (size_t)(m.nodes * stride));
    void *scratch = need(ls_positions_scratch_bytes(&m));
    m.lists = lists;
    ops->attend_listed(&m, q, stride, sum, scratch);
    ops->end_attention(&m, 0, q, stride, sum, out, stride, scratch);
    free(sum), free(scratch);
    return out;
}

static int path_row(int node, int position) {
    for (int i = 0; position >= BASE && i <= node; i++)
        if (tree[node] >> i & 1 && position-- == BASE) return BASE + i;
    return position;
}

/* A node reads as if the rows of its list and of its span were all that there are. */
static void lists_alone(const case_of *c, const int32_t *lists, const float *out) {
    for (int node = 0; node < NODES; node++) {
        const int32_t *list = lists + node * (POSITIONS + 1);
        int count = BASE + __builtin_popcountll(tree[node]), far = (count - 1) / FAR_GROUP * FAR_GROUP;
        int rows = list[0] + count - far, bytes = c->m.row_bytes;
        size_t each = (size_t)(c->m.heads * c->m.width);
        char *keys = need((size_t)(rows * bytes)), *values = need((size_t)(rows * bytes));
        for (int i = 0; i < rows; i++) {
            int row = path_row(node, i < list[0] ? list[1 + i] : far + i - list[0]);
            memcpy(keys + i * bytes, c->m.keys + row * bytes, (size_t)bytes);
            memcpy(values + i * bytes, c->m.values + row * bytes, (size_t)bytes);
        }
        ls_mixer m = c->m;
        m.positions = 0, m.far_group = 0, m.taps = 0, m.nodes = 1, m.staged = 0, m.ancestors = NULL, m.committed = rows;
        m.keys = keys, m.values = values;
        float *alone = attended(ls_current(), &m, c->q + node * each);
        expect(!memcmp(alone, out + node * each, each * sizeof *out), "rows of a list", m.row_kind, m.width, node, rows);
        free(alone), free(keys), free(values);
    }
}

static void positions(int kind, int width) {
    case_of c = listing_case(kind, width);
    int32_t *lists[2] = {selected_positions(plain, c.m, c.q), selected_positions(ls_current(), c.m, c.q)};
    expect(!memcmp(lists[0], lists[1], sizeof **lists * NODES * (POSITIONS + 1)), "positions", kind, width, 0, 0);
    float *out[2] = {attended_lists(plain, c.m, lists[0], c.q), attended_lists(ls_current(), c.m, lists[0], c.q)};
    size_t bytes = sizeof **out * (size_t)(NODES * c.m.heads * width);
    expect(!memcmp(out[0], out[1], bytes), "attention to positions", kind, width, 0, 0);
    free(out[0]), free(out[1]);
    c.m.taps = 0;
    out[0] = attended_lists(ls_current(), c.m, lists[0], c.q);
    lists_alone(&c, lists[0], out[0]);
    free(out[0]), free(lists[0]), free(lists[1]);
    free_case(&c);
}

/* numbers of which many are equal, zeros of both signs and infinite ones, against a search for each */
static void greatest(int count, int most) {
    float *x = need(sizeof *x * (size_t)count);
    int32_t *found = need(sizeof *found * (size_t)(most < count ? most : count));
    char *taken = need((size_t)count);
    memset(taken, 0, (size_t)count);
    for (int i = 0; i < count; i++) {
        x[i] = (float)((int)(next() % 40) - 20) * (next() % 3 ? 1.0f : 0.37f);
        if (next() % 50 == 0) x[i] = next() % 2 ? INFINITY : -INFINITY;
        if (next() % 20 == 0) x[i] = next() % 2 ? -0.0f : 0.0f;
    }
    int have = ls_greatest(x, count, most, found);
    expect(have == (most < count ? most : count), "how many are greatest", count, most, have, 0);
    for (int i = 0; i < have; i++) {
        int best = -1;
        for (int k = 0; k < count; k++)
            if (!taken[k] && (best < 0 || x[k] > x[best])) best = k;
        taken[best] = 1;
    }
    for (int i = 0; i < have; i++)
        expect(taken[found[i]] && (i == 0 || found[i] > found[i - 1]), "the greatest", count, most, i, found[i]);
    free(x), free(found), free(taken);
}

static void all_positions(void) {
    const int widths[] = {2, 30, 64}, counts[] = {1, 7, 300}, most[] = {1, 7, 120, 400};
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < 4; k++) greatest(counts[i], most[k]);
        for (size_t kind = 0; kind < sizeof row_kinds / sizeof *row_kinds; kind++) positions(row_kinds[kind], widths[i]);
    }
}
