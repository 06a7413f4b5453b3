/* Rows that stay of closed groups: every set as plain C has them, a group after the other as all at once, on buffers
 * that end where the last row does. */

static void evict(int width, int repeats, int budget, int asked, int pool) {
    enum { GROUP = 12, GROUPS = 4 };
    size_t rows = GROUP * GROUPS, wide = (size_t)((repeats + 1) * width);
    float *keys = floats(rows * wide), *values = floats(rows * (size_t)width), *kept[3];
    ls_mixer m = {.heads = repeats, .kv_heads = 1, .width = width, .group = GROUP, .score_scale = 1 / sqrtf((float)width),
                  .score_cap = pool ? 2.0f : 0.0f, .row_kind = LS_F32, .row_bytes = (int)wide * 4, .value_bytes = width * 4,
                  .keys = (char *)keys, .values = (char *)values, .budget = budget, .asked = asked, .pool = pool};
    size_t size = ls_kept_floats(&m);
    float *scratch = need(ls_close_floats(&m) * sizeof(float));
    for (int i = 0; i < 3; i++) {
        kept[i] = need(size * sizeof(float));
        memset(kept[i], 0, size * sizeof(float));
        const ls_ops *ops = i ? ls_current() : plain;
        for (int group = 0; group < (i == 2 ? GROUPS : 1); group++)
            ops->close_groups(&m, group * GROUP, (i == 2 ? group + 1 : GROUPS) * GROUP, kept[i], scratch);
    }
    expect(memcmp(kept[0], kept[1], size * sizeof(float)) == 0, "rows that stay", width, repeats, budget, pool);
    expect(memcmp(kept[1], kept[2], size * sizeof(float)) == 0, "group by group", width, repeats, budget, pool);
    int there = 0;
    for (int i = 0; i < budget; i++) there += kept[1][(size_t)(i + 1) * (size_t)(2 * width + 1) - 1] > 0.0f;
    expect(there == (budget < (int)rows ? budget : (int)rows), "as many as there is room for", width, repeats, budget, pool);
    for (int i = 0; i < 3; i++) free(kept[i]);
    free(keys), free(values), free(scratch);
}

static void all_evicting(void) {
    const int budgets[] = {1, 7, 30, 100};
    for (int i = 0; i < 4; i++)
        for (int width = 7; width <= 64; width += 19)
            for (int repeats = 1; repeats <= 3; repeats++) {
                evict(width, repeats, budgets[i], 12, 0);
                evict(width, repeats, budgets[i], 5, 3);
            }
}
