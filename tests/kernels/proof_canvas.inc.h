/* Canvases whose nodes overwrite, with sums over far groups: plain C, on any number of threads, and with all sums made
 * anew, in buffers without a byte to spare. Part of proof.c. */

enum { CANVASES = 3, CANVAS_ROWS = 37, CANVAS_GROUP = 8, CANVAS_ROOM = 5, CANVAS_TAPS = 19, CANVAS_PIECE = 16 };
enum { CANVAS_NODES = 2 * CANVAS_ROWS };

static const int32_t canvas_lengths[CANVASES] = {CANVAS_ROWS, 9, 1};

typedef struct {
    lean_model of;
    ls_summed form;
    float *conv_weights, *maps;
} canvas_model;

/* a softmax over near rows beside sums of unit features, and a mixer of sums; each kv head has a state of its own */
static void make_canvas(canvas_model *m, int map, int exact, int end) {
    make_lean(&m->of, LS_F32, 0);
    m->form = form_of(LEAN_WIDTH, map, exact, end, 1);
    m->conv_weights = floats(4 * CANVAS_TAPS);
    m->maps = floats(2 * LEAN_WIDTH * LEAN_WIDTH);
    if (m->form.map_rows) m->form.query_map = m->form.key_map = m->maps;
    m->of.layer.taps = CANVAS_TAPS;
    m->of.layer.conv_weights = m->conv_weights;
    for (int i = 0; i < 2; i++) {
        ls_mixer_part *p = m->of.parts + i;
        int columns = LEAN_WIDTH + (i ? m->form.ones : 0);
        free(p->keys), free(p->values);
        p->summed = i ? &m->form : NULL;
        p->group = CANVAS_GROUP;
        p->span = m->form.exact == LS_WEIGHT_NONE ? 1 : 2;
        p->alpha = 0.5f;
        p->value_bytes = 4 * columns;
        p->key_stride = CANVAS_ROWS * p->row_bytes;
        p->value_stride = CANVAS_ROWS * p->value_bytes;
        p->sum_floats = (i ? m->form.features : LEAN_WIDTH) * columns;
        p->group_room = CANVAS_ROOM;
    }
}

static void new_canvases(canvas_model *m) {
    for (int i = 0; i < 2; i++) {
        ls_mixer_part *p = m->of.parts + i;
        p->keys = need((size_t)(CANVASES * p->key_stride));
        p->values = need((size_t)(CANVASES * p->value_stride));
        p->group_sums = need(sizeof(float) * CANVASES * CANVAS_ROOM * (size_t)p->sum_floats);
        p->group_rows = calloc(CANVASES * CANVAS_ROOM, sizeof(int32_t));
    }
}

static void free_canvases(canvas_model *m) {
    for (int i = 0; i < 2; i++) {
        ls_mixer_part *p = m->of.parts + i;
        free(p->keys), free(p->values), free(p->group_sums), free(p->group_rows);
        p->keys = p->values = NULL;
    }
}

/* logits of nodes that overwrite rows of slots, in the order of these */
static void canvas_step(const canvas_model *m, int count, const int32_t *slots, int32_t *rows, int threads, float *logits) {
    ls_step_input input[CANVAS_NODES];
    int32_t tokens[CANVAS_NODES], output_rows[CANVAS_NODES];
    ls_batch b = {.rows = count, .outputs = count, .chained = 1, .tokens = tokens, .positions = rows,
                  .output_rows = output_rows, .input = input, .logits = logits};
    for (int first = 0, last; first < count; first = last, b.inputs++) {
        for (last = first; last < count && last - first < CANVAS_PIECE && slots[last] == slots[first]; last++)
            tokens[last] = (slots[last] * 7 + rows[last] * 3 + count) % 40, output_rows[last] = last;
        input[b.inputs] = (ls_step_input){.slot = slots[first], .first = first, .nodes = last - first,
                                          .committed = canvas_lengths + slots[first], .overwritten = rows + first};
    }
    b.hidden = need(sizeof(float) * (size_t)(count * m->of.d.width));
    void *space = aligned_alloc(64, (size_t)(ls_step_workspace(&m->of.d, &b, threads) + 63) / 64 * 64);
    ls_step(&m->of.d, &b, space, threads);
    free(space), free(b.hidden);
}

/* whole canvases, then a block and some rows; anew: all sums are made again in between */
static float *canvas_history(canvas_model *m, int threads, int anew) {
    int32_t slots[CANVAS_NODES], rows[CANVAS_NODES], some_slots[] = {0, 0, 0, 0, 0, 0, 1}, some[] = {15, 16, 17, 18, 19, 3, 8};
    int count = 0, vocabulary = m->of.d.vocabulary;
    for (int slot = 0; slot < CANVASES; slot++)
        for (int row = 0; row < canvas_lengths[slot]; row++) slots[count] = slot, rows[count++] = row;
    float *logits = need(sizeof *logits * (size_t)((count + 7) * vocabulary));
    new_canvases(m);
    canvas_step(m, count, slots, rows, threads, logits);
    for (int i = 0; anew && i < 2; i++) memset(m->of.parts[i].group_rows, 0, sizeof(int32_t) * CANVASES * CANVAS_ROOM);
    canvas_step(m, 7, some_slots, some, threads, logits + count * vocabulary);
    free_canvases(m);
    return logits;
}

static void canvas_of(int map, int exact, int end) {
    const char *set = ls_current()->name;
    canvas_model m;
    make_canvas(&m, map, exact, end);
    size_t bytes = sizeof(float) * (size_t)((CANVAS_ROWS + 9 + 1 + 7) * m.of.d.vocabulary);
    if (!ls_use_isa("portable")) abort();
    float *one = canvas_history(&m, 1, 0);
    if (!ls_use_isa(set)) abort();
    for (int threads = 1; threads <= 5; threads += 2)
        for (int anew = 0; anew < 2; anew++) {
            float *more = canvas_history(&m, threads, anew);
            expect(!memcmp(one, more, bytes), "canvas", map, exact, threads, anew);
            free(more);
        }
    free(one), free(m.conv_weights), free(m.maps);
    free_lean(&m.of);
}

static void all_canvases(void) {
    canvas_of(LS_MAP_RELU, LS_WEIGHT_PRODUCTS, LS_END_QUOTIENT);
    canvas_of(LS_MAP_UNIT, LS_WEIGHT_NONE, LS_END_PLAIN);
    canvas_of(LS_MAP_TWO_SIDED, LS_WEIGHT_EXPONENTIALS, LS_END_QUOTIENT);
}
