/* Far keys as rebuilt from their changes: every kind of row, a tree whose groups close, pieces. Part of proof.c. */

/* BASE is not a whole number of these groups, so that some close on the paths of the tree */
static case_of rebuilt_case(int kind, int width, int group, int span) {
    case_of c = make_case(kind, width, 0, 0, 0, TAPS, RANDOM);
    c.m.rebuilt = 1, c.m.threshold = 0.5f, c.m.far_group = group, c.m.far_span = span;
    return c;
}

/* every set as plain C, in pieces that begin anywhere */
static void rebuilt_alike(int kind, int width, int group, int span) {
    case_of c = rebuilt_case(kind, width, group, span);
    size_t bytes = sizeof(float) * (size_t)(NODES * QUERY_HEADS * width);
    float *one = attended(plain, &c.m, c.q);
    const int pieces[] = {1, 5, 11, LS_CHUNK_BLOCKS};
    for (int i = 0; i < 4; i++) {
        float *cut = attended_in_pieces(ls_current(), &c.m, c.q, pieces[i]);
        expect(memcmp(one, cut, bytes) == 0, "rebuilt keys", kind, width, group, pieces[i]);
        free(cut);
    }
    free(one);
    free_case(&c);
}

/* of a node alone: its far keys, in the place of the whole ones */
static void rebuild_in_place(const ls_mixer *m, char *keys, int far) {
    const float *last = NULL;
    for (int position = 0, row = 0; position < far; position++, row++) {
        while (row >= m->committed && !(m->ancestors[m->staged - 1] >> (row - m->committed) & 1)) row++;
        float *key = (float *)(keys + row * (int64_t)m->row_bytes);
        for (int c = 0; position % m->far_group && c < m->width; c++)
            if (!(fabsf(key[c] - last[c]) > m->threshold)) key[c] = last[c];
        last = key;
    }
}

/* A node gets the bits of attention to keys that were rebuilt beforehand. */
static void rebuilt_beforehand(int width, int group, int span) {
    case_of c = rebuilt_case(LS_F32, width, group, span);
    size_t each = (size_t)(QUERY_HEADS * width);
    float *together = attended(ls_current(), &c.m, c.q);
    for (int node = 0; node < NODES; node++) {
        ls_mixer alone = c.m;
        alone.nodes = 1, alone.staged = node + 1;
        int position = BASE + __builtin_popcountll(tree[node]) - 1;
        int far = (position / group - span + 1) * group;
        char *keys = copy_of(c.keys, KV * c.m.key_stride);
        for (int head = 0; head < KV; head++) rebuild_in_place(&alone, keys + head * c.m.key_stride, far);
        alone.keys = keys, alone.rebuilt = 0, alone.far_group = 0;
        float *out = attended(ls_current(), &alone, c.q + node * each);
        expect(!memcmp(out, together + node * each, each * sizeof *out), "rebuilt beforehand", width, group, span, node);
        free(out), free(keys);
    }
    free(together);
    free_case(&c);
}

static void all_rebuilt(void) {
    const int widths[] = {2, 30, 64}, groups[] = {1, 16, 134, 1500};
    for (int i = 0; i < 3; i++)
        for (int g = 0; g < 4; g++) {
            rebuilt_beforehand(widths[i], groups[g], 1);
            rebuilt_beforehand(widths[i], groups[g], 3);
            for (size_t kind = 0; kind < sizeof row_kinds / sizeof *row_kinds; kind++)
                rebuilt_alike(row_kinds[kind], widths[i], groups[g], 1);
        }
}
