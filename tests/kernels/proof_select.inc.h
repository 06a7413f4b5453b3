/* Groups that nodes select, by codes and by bounds: every kind of row, a tree. Part of proof.c. */

enum { CHOSEN = 3 };

/* what judges all pages: made in two goes, as by two steps */
static uint16_t *judged(const ls_ops *ops, ls_mixer *m, size_t *bytes) {
    int rows = m->coded ? LS_PAGE : LS_JUDGED, pages = m->committed / rows, side_by_side = m->coded ? 1 : LS_JUDGED;
    *bytes = sizeof *m->judge * (size_t)(ls_judge_numbers(m) * ((pages + side_by_side - 1) / side_by_side));
    m->judge = need(*bytes);
    memset(m->judge, 0, *bytes);
    void (*make)(const ls_mixer *, int, int) = m->coded ? ops->code_pages : ops->bound_pages;
    make(m, 0, pages / 2);
    make(m, pages / 2, pages);
    return m->judge;
}

static float *attended_of_selected(const ls_ops *ops, const ls_mixer *m, const float *q) {
    int stride = m->heads * m->width;
    size_t part = ls_partial_floats(m) * sizeof(float);
    float *sum = need(part), *more = need(part), *out = need(sizeof *out * (size_t)(m->nodes * stride));
    void *scratch = need(ls_select_scratch_bytes(m));
    ops->attend_selected(m, q, stride, sum, more, scratch);
    ops->end_attention(m, 0, q, stride, sum, out, stride, scratch);
    free(sum), free(more), free(scratch);
    return out;
}

static void selected(int kind, int width, int coded, int group, int style) {
    case_of c = make_case(kind, width, 0, group, 0, TAPS, style);
    const ls_ops *ops[2] = {plain, ls_current()};
    uint16_t *judge[2];
    float *out[2];
    size_t bytes;
    c.m.sums = NULL;
    c.m.heads = QUERY_HEADS / KV, c.m.kv_heads = 1;
    c.m.chosen = CHOSEN, c.m.coded = coded;
    for (int i = 0; i < 2; i++) {
        judge[i] = judged(ops[i], &c.m, &bytes);
        out[i] = attended_of_selected(ops[i], &c.m, c.q);
    }
    expect(memcmp(judge[0], judge[1], bytes) == 0, "what judges", kind, width, coded, group);
    bytes = sizeof(float) * (size_t)(NODES * c.m.heads * width);
    expect(memcmp(out[0], out[1], bytes) == 0, "selected", kind, width, coded, group);
    for (int i = 0; i < 2; i++) free(judge[i]), free(out[i]);
    free_case(&c);
}

static void all_selected(void) {
    const int widths[] = {8, 30, 64, 80};
    for (size_t kind = 0; kind < sizeof row_kinds / sizeof *row_kinds; kind++)
        for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
            for (int coded = 0; coded < 2; coded++) {
                selected(row_kinds[kind], widths[i], coded, LS_PAGE, RANDOM);
                selected(row_kinds[kind], widths[i], coded, 2 * LS_PAGE, HIGHEST);
            }
}
