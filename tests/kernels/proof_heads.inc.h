/* Medusa heads: all at once against layer by layer and row by row. Part of proof.c. */

enum { HEADS = 3, BLOCKS = 2, MOST_LAYERS = HEADS * BLOCKS };

static ls_linear some_layer(int kind, int outputs, int inputs) {
    int tiles = (outputs + LS_TILE - 1) / LS_TILE;
    int padded = (inputs + LS_GROUP - 1) / LS_GROUP * LS_GROUP;
    return (ls_linear){.kind = kind, .inputs = inputs, .outputs = outputs, .padded = padded,
                       .weights = some_weights(kind, tiles, inputs, padded, RANDOM),
                       .scales = kind == LS_INT8 ? floats((size_t)tiles * LS_TILE) : NULL,
                       .bias = floats((size_t)outputs)};
}

static void free_layer(const ls_linear *l) {
    free((void *)l->weights), free((void *)l->scales), free((void *)l->bias);
}

/* the `top` largest of x by looking for the largest so often */
static void take_top(float *x, int count, int top, int32_t *to) {
    for (int t = 0; t < top; t++) {
        to[t] = 0;
        for (int i = 1; i < count; i++)
            if (x[i] > x[to[t]]) to[t] = i;
        x[to[t]] = -INFINITY;
    }
}

static void guess_of(const ls_heads *h, int head, const float *hidden, int top, int32_t *to) {
    float *x = copy(hidden, (size_t)h->seen);
    float *inner = need(sizeof *inner * (size_t)h->inner), *y = need(sizeof *y * (size_t)h->width);
    float *logits = need(sizeof *logits * (size_t)h->vocabulary);
    for (int b = 0; b < h->blocks; b++) {
        forward(h->first[b * h->heads + head], x, 1, inner, 1);
        ls_current()->activate(LS_SILU, inner, NULL, h->inner, inner);
        if (h->back) forward(h->back[b * h->heads + head], inner, 1, y, 1);
        for (int k = 0; k < h->width; k++) x[k] = h->back ? y[k] + x[k] : x[k] + inner[k];
    }
    forward(h->out[h->shared ? 0 : head], x, 1, logits, 1);
    take_top(logits, h->vocabulary, top, to);
    free(x), free(inner), free(y), free(logits);
}

static void guesses(const ls_heads *h, int rows, int heads, int top) {
    size_t count = (size_t)rows * heads * top;
    int32_t *tokens = need(sizeof *tokens * count), *expected = need(sizeof *expected * count);
    float **hidden = need(sizeof *hidden * (size_t)rows);
    for (int r = 0; r < rows; r++) {
        hidden[r] = floats((size_t)h->seen);
        for (int k = 0; k < heads; k++)
            guess_of(h, k, hidden[r], top, expected + (r * heads + k) * top);
    }
    ls_guess g = {rows, heads, top, (const float *const *)hidden, tokens};
    void *space = aligned_alloc(64, ((size_t)ls_heads_workspace(h, &g) + 63) / 64 * 64);
    for (int threads = 1; threads <= 3; threads++) {
        ls_heads_guess(h, &g, space, threads);
        expect(memcmp(tokens, expected, sizeof *tokens * count) == 0, "guess", rows, heads, top,
               h->inner);
    }
    for (int r = 0; r < rows; r++) free(hidden[r]);
    free(hidden), free(tokens), free(expected), free(space);
}

static void medusa(int kind, int width, int seen, int inner, int vocabulary, int shared) {
    ls_linear layers[2 * MOST_LAYERS + HEADS];
    const ls_linear *at[2 * MOST_LAYERS + HEADS];
    int own = inner ? inner : width, outputs = shared ? 1 : HEADS;
    for (int i = 0; i < 2 * MOST_LAYERS + HEADS; i++) at[i] = layers + i;
    for (int i = 0; i < MOST_LAYERS; i++) {
        layers[i] = some_layer(kind, own, i < HEADS ? seen : width);
        layers[MOST_LAYERS + i] = some_layer(kind, width, own);
    }
    for (int i = 0; i < HEADS; i++)
        layers[2 * MOST_LAYERS + i] = some_layer(kind, vocabulary, width);
    ls_heads h = {HEADS, BLOCKS, width, own, vocabulary, seen, outputs == 1, at,
                  inner ? at + MOST_LAYERS : NULL, at + 2 * MOST_LAYERS};
    guesses(&h, 1, HEADS, 5);
    guesses(&h, 9, HEADS, 1);
    guesses(&h, 2, 2, vocabulary);
    for (int i = 0; i < 2 * MOST_LAYERS + HEADS; i++) free_layer(layers + i);
}

static void all_heads(void) {
    for (int kind = LS_F32; kind <= LS_INT4; kind++)
        for (int shared = 0; shared < 2; shared++) {
            medusa(kind, 33, 33, 0, 45, shared);
            medusa(kind, 32, 64, 70, 31, shared);
            medusa(kind, 33, 50, 0, 31, shared);
        }
}
