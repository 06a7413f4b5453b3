/* A step over caches of very different lengths: on any number of threads, and each sequence alone, in a workspace
 * without a byte to spare. Part of proof.c. */

enum { LEAN_SLOTS = 6, LEAN_ROWS = 2 * LS_CHUNK + 200, LEAN_WIDTH = 12 };

/* one layer that only mixes, each head with a state of its own */
typedef struct {
    ls_linear layers[3];
    ls_norm norm;
    ls_mixer_part parts[2];
    ls_layer layer;
    ls_decoder d;
    float *table, *weight;
} lean_model;

static int32_t lean_part_of[] = {0, 1}, lean_place[] = {0, 0}, lean_turned = 0;

static void make_lean(lean_model *m, int kind, int window) {
    int heads = 4, kv = 2, each = LEAN_WIDTH, width = 20, vocabulary = 40, bytes = row_bytes(kind, each);
    m->layers[0] = some_layer(LS_F32, (heads + 2 * kv) * each, width);
    m->layers[1] = some_layer(LS_F32, width, heads * each);
    m->layers[2] = some_layer(LS_F32, vocabulary, width);
    m->table = floats((size_t)(vocabulary * width));
    m->weight = floats((size_t)width);
    m->norm = (ls_norm){m->weight, NULL, 0};
    for (int i = 0; i < 2; i++)
        m->parts[i] = (ls_mixer_part){.kv_heads = 1, .keys = some_rows(kind, each, LEAN_SLOTS * LEAN_ROWS, RANDOM),
                                      .values = some_rows(kind, each, LEAN_SLOTS * LEAN_ROWS, RANDOM),
                                      .key_stride = LEAN_ROWS * bytes, .value_stride = LEAN_ROWS * bytes,
                                      .row_kind = kind, .row_bytes = bytes, .value_bytes = bytes, .window = i ? window : 0};
    m->layer = (ls_layer){.part = m->parts, .part_of = lean_part_of, .place = lean_place, .mixer_norm = &m->norm,
                          .rotary = -1, .qkv = m->layers, .out = m->layers + 1};
    m->d = (ls_decoder){.layers = 1, .width = width, .heads = heads, .kv_heads = kv, .head_width = each,
                        .vocabulary = vocabulary, .embedding_kind = LS_F32, .eps = 1e-5f, .score_factor = 1.0f,
                        .embedding_scale = 1.0f, .residual_scale = 1.0f, .logit_scale = 1.0f, .embedding = m->table,
                        .turned = &lean_turned, .final_norm = &m->norm, .head = m->layers + 2, .layer = &m->layer};
}

static void free_lean(lean_model *m) {
    for (int i = 0; i < 3; i++) free_layer(m->layers + i);
    for (int i = 0; i < 2; i++) free(m->parts[i].keys), free(m->parts[i].values);
    free(m->table), free(m->weight);
}

/* logits of all nodes of the slots `first`.., `count` of them */
static float *lean_step(const lean_model *m, int first, int count, const int32_t *committed, const int32_t *nodes,
                        int threads) {
    ls_step_input input[LEAN_SLOTS];
    int32_t tokens[LEAN_SLOTS * NODES], rows[LEAN_SLOTS * NODES];
    ls_batch b = {.inputs = count, .tokens = tokens, .positions = rows, .output_rows = rows, .input = input};
    for (int i = 0; i < count; i++) {
        int slot = first + i;
        input[i] = (ls_step_input){.slot = slot, .first = b.rows, .nodes = nodes[slot], .staged = nodes[slot],
                                   .committed = committed + slot, .ancestors = tree};
        for (int n = 0; n < nodes[slot]; n++, b.rows++) rows[b.rows] = b.rows, tokens[b.rows] = (slot * 7 + n) % 40;
    }
    b.outputs = b.rows;
    b.hidden = need(sizeof(float) * (size_t)(b.rows * m->d.width));
    b.logits = need(sizeof(float) * (size_t)(b.rows * m->d.vocabulary));
    void *space = aligned_alloc(64, (size_t)(ls_step_workspace(&m->d, &b, threads) + 63) / 64 * 64);
    ls_step(&m->d, &b, space, threads);
    free(space), free(b.hidden);
    return b.logits;
}

static void lean(int kind, int window) {
    const int32_t committed[] = {64, 0, LEAN_ROWS - NODES, 63, 65, 323}, nodes[] = {1, 2, NODES, 1, 3, 1};
    const int threads[] = {2, 3, 4, 7, 16};
    lean_model m;
    make_lean(&m, kind, window);
    float *one = lean_step(&m, 0, LEAN_SLOTS, committed, nodes, 1);
    size_t row = (size_t)m.d.vocabulary * sizeof *one, rows = 0;
    for (int slot = 0; slot < LEAN_SLOTS; rows += (size_t)nodes[slot++]) {
        float *alone = lean_step(&m, slot, 1, committed, nodes, 1 + slot % 4);
        expect(!memcmp(alone, one + rows * (size_t)m.d.vocabulary, row * (size_t)nodes[slot]), "a sequence alone", kind,
               window, slot, 0);
        free(alone);
    }
    for (int i = 0; i < 5; i++) {
        float *more = lean_step(&m, 0, LEAN_SLOTS, committed, nodes, threads[i]);
        expect(!memcmp(one, more, row * rows), "threads", kind, window, threads[i], 0);
        free(more);
    }
    free(one);
    free_lean(&m);
}

static void all_lean(void) {
    for (size_t i = 0; i < sizeof row_kinds / sizeof *row_kinds; i++) {
        lean(row_kinds[i], 0);
        lean(row_kinds[i], 400);
    }
}
