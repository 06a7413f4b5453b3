/* Entries and trees of a drafter of one fused layer: of several sequences against each alone, on any number of
 * threads, in a workspace without a byte to spare. Part of proof.c. */

enum { SEEDS = 3, READ = 2, GROW_ROWS = 40 + LS_MAX_NODES };

/* The fresh entries of `count` slots from `first` on: those that have any. */
static ls_batch fresh_entries(int first, int count, const int32_t *nodes, const int32_t *before, const int32_t *tokens,
                              const int32_t *positions, ls_step_input *table, const uint64_t *chain) {
    ls_batch b = {.tokens = tokens, .positions = positions, .input = table};
    for (int i = first; i < first + count; i++) {
        if (!nodes[i]) continue;
        table[b.inputs++] = (ls_step_input){.slot = i, .first = b.rows, .nodes = nodes[i], .staged = nodes[i],
                                            .committed = before + i, .ancestors = chain};
        b.rows += nodes[i];
    }
    return b;
}

/* a layer of 4 heads of 10 features and 2 kv heads, over a state of SEEDS slots */
static void grow_with(int kind, int normed, int top, int levels) {
    int width = 36, heads = 4, kv = 2, each = 10, mlp = 50, vocabulary = 45, turned = 10, part_of[] = {0, 0}, place[] = {0, 1};
    ls_linear layers[] = {some_layer(kind, (heads + 2 * kv) * each, 2 * width), some_layer(kind, width, heads * each),
                          some_layer(kind, 2 * mlp, width), some_layer(kind, width, mlp), some_layer(kind, vocabulary, width)};
    size_t rows = (size_t)SEEDS * kv * GROW_ROWS * each;
    float *keys = floats(rows), *values = floats(rows), *table = floats((size_t)vocabulary * width), *weight = floats((size_t)width);
    float *turns = floats(60 * (size_t)turned), *states = floats(8 * READ * (size_t)width);
    ls_norm norm = {weight, NULL, 0};
    int32_t bytes = each * (int32_t)sizeof(float);
    ls_mixer_part part = {.kv_heads = kv, .keys = (char *)keys, .values = (char *)values, .key_stride = GROW_ROWS * bytes,
                          .value_stride = GROW_ROWS * bytes, .row_kind = LS_F32, .row_bytes = bytes, .value_bytes = bytes};
    ls_layer layer = {.part = &part, .part_of = part_of, .place = place, .mixer_norm = &norm, .mlp_norm = &norm,
                      .qkv = layers, .out = layers + 1, .up = layers + 2, .down = layers + 3};
    ls_decoder d = {.layers = 1, .width = width, .heads = heads, .kv_heads = kv, .head_width = each, .mlp_width = mlp,
                    .vocabulary = vocabulary, .embedding_kind = LS_F32, .gated = 1, .eps = 1e-5f, .score_factor = 1.0f,
                    .embedding_scale = 1.0f, .residual_scale = 1.0f, .logit_scale = 1.0f, .embedding = table,
                    .turned = &turned, .final_norm = &norm, .token_norm = &norm, .head = layers + 4, .layer = &layer};
    ls_linear fuse = some_layer(kind, width, READ * width);
    const ls_norm *norms[] = {&norm, &norm};
    ls_fusion fusion = {.read = READ, .norm = normed ? norms : NULL, .layer = &fuse};
    /* slot 1 has nothing new */
    int32_t fresh[] = {3, 0, 5}, before[] = {37, 1, 12}, committed[] = {40, 1, 17}, from[] = {0, 3, 3};
    int32_t new_tokens[8], positions[] = {37, 38, 39, 12, 13, 14, 15, 16};
    const float *lines[8 * READ], *cosines[] = {turns}, *sines[] = {turns};
    uint64_t chain[8];
    for (int i = 0; i < 8; i++) {
        new_tokens[i] = 5 * i;
        chain[i] = ((uint64_t)2 << i) - 1;
        for (int k = 0; k < READ; k++) lines[i * READ + k] = states + (i * READ + k) * width;
    }
    int32_t ids[45], slots[] = {0, 1, 2}, nodes[] = {LS_MAX_NODES - 1, 5, 20}, depths[] = {levels, levels, 2};
    int32_t found[SEEDS], tokens[SEEDS * LS_MAX_NODES], parents[SEEDS * LS_MAX_NODES];
    int32_t alone, tokens1[LS_MAX_NODES], parents1[LS_MAX_NODES], end_tokens[SEEDS * LS_MAX_NODES];
    float shares[SEEDS * LS_MAX_NODES], shares1[LS_MAX_NODES], end_shares[SEEDS * LS_MAX_NODES];
    float *ends = floats(SEEDS * (size_t)width);
    for (int i = 0; i < vocabulary; i++) ids[i] = vocabulary - 1 - i;
    for (int k = 0; k < top; k++) end_tokens[top + k] = 3 + k, end_shares[top + k] = -1.0f - (float)k;
    for (int threads = 1; threads <= 3; threads++) {
        ls_step_input table[SEEDS];
        ls_batch b = fresh_entries(0, SEEDS, fresh, before, new_tokens, positions, table, chain);
        b.cosines = cosines, b.sines = sines;
        ls_growth g = {.sequences = SEEDS, .top = top, .levels = levels, .normed = normed, .fresh = &b, .fusion = &fusion,
                       .read_states = lines, .ends = ends, .end_tokens = end_tokens, .end_shares = end_shares,
                       .slots = slots, .committed = committed, .nodes = nodes, .depths = depths, .ids = ids,
                       .cosines = cosines, .sines = sines, .tokens = tokens, .parents = parents, .shares = shares,
                       .found = found};
        void *space = aligned_alloc(64, (size_t)(ls_grow_workspace(&d, &g, threads) + 63) / 64 * 64);
        ls_grow(&d, &g, space, threads);
        free(space);
        for (int i = 0; i < SEEDS; i++) {
            ls_growth one = g;
            ls_batch mine = fresh_entries(i, 1, fresh, before, new_tokens + from[i], positions + from[i], table, chain);
            mine.cosines = cosines, mine.sines = sines;
            one.fresh = fresh[i] ? &mine : NULL, one.read_states = lines + from[i] * READ;
            one.sequences = 1, one.slots = slots + i, one.committed = committed + i, one.nodes = nodes + i;
            one.depths = depths + i, one.tokens = tokens1, one.parents = parents1;
            one.shares = shares1, one.found = &alone;
            space = aligned_alloc(64, (size_t)(ls_grow_workspace(&d, &one, 1) + 63) / 64 * 64);
            ls_grow(&d, &one, space, 1);
            free(space);
            size_t at = (size_t)i * LS_MAX_NODES, size = (size_t)alone * sizeof(int32_t);
            int same = alone == found[i] && !memcmp(tokens + at, tokens1, size) && !memcmp(parents + at, parents1, size) &&
                       !memcmp(shares + at, shares1, size);
            expect(same && alone > 0 && alone <= nodes[i], "grow", kind, normed, top, threads);
        }
    }
    free_layer(&fuse);
    free(ends);
    for (int i = 0; i < 5; i++) free_layer(layers + i);
    free(keys), free(values), free(table), free(weight), free(turns), free(states);
}

static void all_growth(void) {
    for (int kind = LS_F32; kind <= LS_INT4; kind++)
        for (int normed = 0; normed < 2; normed++) {
            grow_with(kind, normed, 4, 6);
            grow_with(kind, normed, 1, 9);
            grow_with(kind, normed, 31, 3);
        }
}
