/* Trees that grow where a drafter of one fused layer is sure, in one call: the entries of tokens that were committed,
 * then level after level through the layer, the output layer, the likeliest tokens and the choice of what is
 * asked next.
 *
 * drafters/confident.py says which nodes those are, in the same words. Keys and values of fresh entries are staged
 * behind the committed rows of their slots. Those of nodes come behind them and mean nothing afterwards. */
#include <math.h>
#include <string.h>

#include "step.h"

#define UNLIKELY -1e30f /* logarithm of a share that is too small for a float */

/* Its nodes in the order in which they were found. row: the row of its parent in the last step, whose state the
 * node goes on from. place: its row among the staged ones, where it was asked about. */
typedef struct {
    int32_t *token, *parent, *row, *place;
    float *share;
    double *value; /* logarithm of how likely the path is */
    int32_t count, first, staged, asked; /* nodes; first of the newest level; staged rows; nodes of the last step */
    uint64_t ancestors[LS_MAX_NODES];
} tree;

/* What a level takes, for all trees; `states` of the last step and of the one before. */
typedef struct {
    const ls_decoder *d;
    const ls_growth *g;
    tree *trees;
    ls_step_input *inputs;
    int32_t *tokens, *positions, *outputs, *level;
    const float **given;
    float *logits, *hidden, *raw[2];
    void *packed, *step;
} growing;

static int most_nodes(const ls_growth *g) { return g->top * (1 + g->top * (g->levels - 1)); }

static int most_rows(const ls_growth *g) { return g->sequences * g->top; }

/* The next of the nodes first .. count - 1 behind node `after` by value, earlier ones first among equals; -1 at
 * the end. `after` -1 is the begin. */
static int next_node(const tree *t, int first, int after) {
    int best = -1;
    for (int i = first; i < t->count; i++) {
        int behind = after < 0 || t->value[i] < t->value[after] || (t->value[i] == t->value[after] && i > after);
        if (behind && (best < 0 || t->value[i] > t->value[best])) best = i;
    }
    return best;
}

static void add(tree *t, int parent, int row, int32_t token, float share) {
    int at = t->count++;
    t->token[at] = token;
    t->parent[at] = parent;
    t->row[at] = row;
    t->place[at] = -1;
    t->share[at] = share;
    t->value[at] = (parent < 0 ? 0.0 : t->value[parent]) + share;
}

/* The nodes to ask about, likeliest first; returns how many. */
static int choose_level(const growing *s, tree *t, int number, int depth, int32_t *level) {
    int first = t->first, wide = 0, nodes = s->g->nodes[number];
    double least = -INFINITY;
    t->first = t->count;
    if (depth >= s->g->depths[number]) return 0;
    int at = -1;
    for (int i = 0; t->count >= nodes && i < nodes; i++) at = next_node(t, 0, at);
    if (at >= 0) least = t->value[at];
    for (at = next_node(t, first, -1); at >= 0 && wide < s->g->top; at = next_node(t, first, at))
        if (t->value[at] > least) level[wide++] = at;
    return wide;
}

/* what drafts go on from behind the newest entry of a slot */
static float *end_of(const growing *s, int slot) { return s->g->ends + (size_t)slot * s->d->width; }

/* What a tree has in the next step, whose rows begin at `row`; returns whether there is any. */
static int ask(growing *s, int number, int depth, int row, ls_step_input *in) {
    tree *t = s->trees + number;
    int32_t *level = s->level + row;
    size_t width = (size_t)s->d->width;
    t->asked = choose_level(s, t, number, depth, level);
    for (int i = 0; i < t->asked; i++) {
        int node = level[i], parent = t->parent[node], place = t->place[node] = t->staged + i;
        uint64_t before = parent < 0 ? 0 : t->ancestors[t->place[parent]];
        t->ancestors[place] = before | (uint64_t)1 << place;
        s->tokens[row + i] = t->token[node];
        s->positions[row + i] = s->g->committed[number] + depth - 1;
        s->outputs[row + i] = row + i;
        s->given[row + i] = parent < 0 ? end_of(s, s->g->slots[number]) : s->raw[(depth + 1) % 2] + t->row[node] * width;
    }
    t->staged += t->asked;
    *in = (ls_step_input){.slot = s->g->slots[number], .first = row, .nodes = t->asked, .staged = t->staged,
                          .committed = s->g->committed + number, .ancestors = t->ancestors};
    return t->asked > 0;
}

/* The likeliest tokens by one row of logits, with the logarithms of their shares. */
static void likeliest(const growing *s, int row, int32_t *tokens, float *shares) {
    float *all = s->logits + (size_t)row * s->d->vocabulary;
    ls_current()->map(LS_MAP_SOFTMAX, all, s->d->vocabulary);
    ls_top_k(all, s->d->vocabulary, s->g->top, tokens);
    for (int k = 0; k < s->g->top; k++) {
        float share = all[tokens[k]];
        shares[k] = share > 0.0f ? logf(share) : UNLIKELY;
        tokens[k] = s->g->ids[tokens[k]];
    }
}

/* The children of the nodes of the last step. */
static void answer(growing *s, int number, int row) {
    tree *t = s->trees + number;
    int32_t tokens[LS_MAX_NODES];
    float shares[LS_MAX_NODES];
    for (int i = 0; i < t->asked; i++) {
        likeliest(s, row + i, tokens, shares);
        for (int k = 0; k < s->g->top; k++) add(t, s->level[row + i], row + i, tokens[k], shares[k]);
    }
}

/* One level of all trees; returns the rows of its step, 0 at the end. */
static int grow_level(growing *s, int depth, int threads) {
    const ls_growth *g = s->g;
    int rows = 0, inputs = 0, zero = 0;
    for (int i = 0; i < g->sequences; i++) {
        inputs += ask(s, i, depth, rows, s->inputs + inputs);
        rows += s->trees[i].asked;
    }
    if (!rows) return 0;
    float *raw = s->raw[depth % 2];
    ls_batch b = {.rows = rows, .inputs = inputs, .outputs = rows, .tokens = s->tokens,
                  .positions = s->positions, .given = s->given, .output_rows = s->outputs,
                  .cosines = g->cosines, .sines = g->sines, .input = s->inputs,
                  .hidden = g->normed ? raw : s->hidden, .logits = s->logits, .layers = !g->normed,
                  .layer_numbers = &zero, .layer_states = raw};
    ls_step(s->d, &b, s->step, threads);
    for (int i = 0, row = 0; i < g->sequences; row += s->trees[i++].asked) answer(s, i, row);
    return rows;
}

/* The likeliest nodes of a tree, likeliest first: a parent comes before its children. */
static void hand_out_tree(const growing *s, int number) {
    const tree *t = s->trees + number;
    int32_t *tokens = s->g->tokens + (size_t)number * LS_MAX_NODES;
    int32_t *parents = s->g->parents + (size_t)number * LS_MAX_NODES;
    float *shares = s->g->shares + (size_t)number * LS_MAX_NODES;
    int found = 0;
    for (int at = next_node(t, 0, -1); at >= 0 && found < s->g->nodes[number]; at = next_node(t, 0, at)) {
        int parent = t->parent[at];
        tokens[found] = t->token[at];
        shares[found] = t->share[at];
        /* nodes of the tree are counted behind the root; `place` has served */
        parents[found] = parent < 0 ? 0 : t->place[parent];
        t->place[at] = ++found;
    }
    s->g->found[number] = found;
}

/* bytes at `*at` of `count` things, each part of a workspace beginning at a multiple of 64 */
static void *take(uintptr_t *at, size_t count, size_t size) {
    uintptr_t here = *at;
    *at += ls_up64(count * size);
    return (void *)here;
}

/* Cut a workspace into parts; returns where that of a step begins. A workspace of null is only measured. */
static uintptr_t cut(growing *s, uintptr_t workspace) {
    const ls_growth *g = s->g;
    size_t rows = (size_t)most_rows(g), nodes = (size_t)most_nodes(g), width = (size_t)s->d->width;
    uintptr_t at = workspace;
    s->trees = take(&at, (size_t)g->sequences, sizeof(tree));
    s->inputs = take(&at, (size_t)g->sequences, sizeof *s->inputs);
    s->tokens = take(&at, rows, sizeof *s->tokens);
    s->positions = take(&at, rows, sizeof *s->positions);
    s->outputs = take(&at, rows, sizeof *s->outputs);
    s->level = take(&at, rows, sizeof *s->level);
    s->given = take(&at, rows, sizeof *s->given);
    if (g->fresh) s->packed = take(&at, ls_packed_bytes(g->fusion->layer, g->fresh->rows), 1);
    s->logits = take(&at, rows * (size_t)s->d->vocabulary, sizeof(float));
    s->hidden = take(&at, rows * width, sizeof(float));
    for (int i = 0; i < 2; i++) s->raw[i] = take(&at, rows * width, sizeof(float));
    for (int i = 0; i < g->sequences; i++) {
        tree t = {0};
        int32_t **whole[] = {&t.token, &t.parent, &t.row, &t.place};
        for (int k = 0; k < 4; k++) *whole[k] = take(&at, nodes, sizeof(int32_t));
        t.share = take(&at, nodes, sizeof(float));
        t.value = take(&at, nodes, sizeof(double));
        if (workspace) s->trees[i] = t;
    }
    s->step = (void *)at;
    return at;
}

/* bytes of the largest step that one sequence can be in; those of all are no less than what a common step takes */
static size_t step_bytes(const ls_decoder *d, const ls_growth *g, int number, int threads) {
    uint64_t none[LS_MAX_NODES] = {0};
    ls_step_input in = {.slot = g->slots[number], .nodes = g->top, .staged = LS_MAX_NODES,
                        .committed = g->committed + number, .ancestors = none};
    ls_batch b = {.rows = g->top, .inputs = 1, .outputs = g->top, .input = &in};
    return (size_t)ls_step_workspace(d, &b, threads);
}

/* ---- entries of tokens that were committed */

/* The fresh entries with the last of each slot as outputs. */
static ls_batch fresh_batch(const growing *s) {
    ls_batch b = *s->g->fresh;
    b.outputs = b.inputs;
    b.output_rows = s->outputs;
    b.hidden = s->hidden;
    b.logits = s->logits;
    return b;
}

typedef struct {
    const growing *s;
    ls_run run;
} catching_up;

static void catch_up_body(void *context, int thread, int threads) {
    const catching_up *c = context;
    ls_fuse(c->s->g->fusion, &c->run, c->s->g->read_states, c->s->packed, thread, threads);
    ls_run_block(&c->run, c->run.d->layer, thread, threads);
    ls_run_end(&c->run, thread, threads);
}

/* Make the fresh entries, and note what the last of each slot says. */
static void catch_up(const growing *s, int threads) {
    const ls_growth *g = s->g;
    ls_batch b = fresh_batch(s);
    catching_up c = {s, ls_run_at(s->d, &b, s->step, threads)};
    size_t width = (size_t)s->d->width;
    for (int i = 0; i < b.inputs; i++) s->outputs[i] = b.input[i].first + b.input[i].nodes - 1;
    ls_parallel(catch_up_body, &c, threads, LS_SPIN_STEP);
    for (int i = 0; i < b.inputs; i++) {
        int slot = b.input[i].slot;
        const float *raw = c.run.x + (size_t)b.output_rows[i] * width;
        memcpy(end_of(s, slot), g->normed ? b.hidden + (size_t)i * width : raw, width * sizeof *raw);
        likeliest(s, i, g->end_tokens + (size_t)slot * g->top, g->end_shares + (size_t)slot * g->top);
    }
}

/* ---- */

/* Bytes of workspace that `ls_grow` needs. */
LS_API int64_t ls_grow_workspace(const ls_decoder *d, const ls_growth *g, int32_t threads) {
    growing s = {.d = d, .g = g};
    size_t bytes = cut(&s, 0), steps = 0, fresh = 0;
    for (int i = 0; i < g->sequences; i++) steps += ls_up64(step_bytes(d, g, i, threads));
    if (g->fresh) {
        ls_batch b = fresh_batch(&s);
        fresh = ls_up64((size_t)ls_step_workspace(d, &b, threads));
    }
    return (int64_t)(bytes + (steps > fresh ? steps : fresh));
}

/* d: one fused layer, whose state has room for the fresh rows of a slot and LS_MAX_NODES staged ones behind them.
 * workspace has `ls_grow_workspace` bytes and is 64-byte aligned. */
LS_API void ls_grow(const ls_decoder *d, const ls_growth *g, void *workspace, int32_t threads) {
    growing s = {.d = d, .g = g};
    cut(&s, (uintptr_t)workspace);
    if (g->fresh) catch_up(&s, threads);
    for (int i = 0; i < g->sequences; i++)
        for (int k = 0; k < g->top; k++) {
            size_t at = (size_t)g->slots[i] * g->top + k;
            add(s.trees + i, -1, 0, g->end_tokens[at], g->end_shares[at]);
        }
    for (int depth = 1; grow_level(&s, depth, threads); depth++) continue;
    for (int i = 0; i < g->sequences; i++) hand_out_tree(&s, i);
}
