/* A block drafter (drafters/block_net.py) in one call: from the target's states of the tokens that were committed
 * to the drafts behind them.
 *
 * Its layers are those of a decoder in step.c: the nodes of a block see each other in both directions, and
 * rows of context are staged ahead of them as if they had been committed. Threads wait as in step.c. */
#include <string.h>

#include "step.h"

#define LANES 16

typedef struct {
    const ls_block_drafter *d;
    const ls_block_round *r;
    ls_run context, blocks;
    void *packed; /* for layers that a step has not */
} drafting;

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

/* Bytes of workspace that `ls_block_draft` needs. */
LS_API int64_t ls_block_draft_workspace(const ls_block_drafter *d, const ls_block_round *r, int32_t threads) {
    size_t packed = larger(ls_packed_bytes(d->fusion->layer, r->context->rows),
                           ls_packed_bytes(d->markov, r->blocks->inputs));
    return ls_step_workspace(d->decoder, r->context, threads) + ls_step_workspace(d->decoder, r->blocks, threads) +
           (int64_t)ls_up64(packed);
}

/* rows of context where the residual of their run is; and the newest of each slot */
static void fuse(const drafting *s, int thread, int threads) {
    const ls_batch *b = s->r->context;
    size_t width = (size_t)s->d->decoder->width;
    ls_fuse(s->d->fusion, &s->context, s->r->states, s->packed, thread, threads);
    for (int i = ls_share(b->inputs, thread, threads); i < ls_share(b->inputs, thread + 1, threads); i++) {
        const ls_step_input *in = b->input + i;
        if (in->nodes)
            memcpy(s->r->newest + (size_t)in->slot * width, s->context.x + (size_t)(in->first + in->nodes - 1) * width,
                   width * sizeof(float));
    }
}

/* keys and values of the rows of context, in every layer */
static void keep(const drafting *s, int thread, int threads) {
    const ls_run *run = &s->context;
    const ls_decoder *d = run->d;
    int items = run->b->inputs * d->kv_heads, last = ls_share(items, thread + 1, threads);
    for (int layer = 0; layer < d->layers; layer++) {
        const ls_layer *l = d->layer + layer;
        ls_packed_rows x = ls_pack_inputs(run, l->qkv, NULL, run->x, run->b->rows, thread, threads);
        ls_multiply(l->qkv, &x, run->projected, 0, thread, threads);
        for (int i = ls_share(items, thread, threads); i < last; i++)
            ls_stage(run, l, i / d->kv_heads, i % d->kv_heads);
        ls_barrier(threads);
    }
}

/* what places start from */
static void enter(const drafting *s, int thread, int threads) {
    const ls_block_drafter *d = s->d;
    const ls_batch *b = s->r->blocks;
    int width = d->decoder->width, last = ls_share(b->rows, thread + 1, threads);
    for (int row = ls_share(b->rows, thread, threads); row < last; row++) {
        int input = row / d->places;
        const float *mask = d->masks + (size_t)(row % d->places) * width;
        const float *root = s->r->roots + (size_t)input * width;
        const float *newest = s->r->newest + (size_t)b->input[input].slot * width;
        float *x = s->blocks.x + (size_t)row * width;
        for (int i = 0; i < width; i++) x[i] = mask[i] + (root[i] + newest[i]);
    }
}

/* what is known of the token before a place */
static const float *before(const drafting *s, int input, int place) {
    int rank = s->d->rank, at = input * s->d->places + place;
    return place ? s->d->before + (size_t)s->r->drafts[at - 1] * rank : s->r->before + (size_t)input * rank;
}

static float confidence(const ls_block_drafter *d, const float *state, const float *token) {
    int width = d->decoder->width;
    float sum = d->sure[width + d->rank];
    for (int i = 0; i < width; i++) sum += d->sure[i] * state[i];
    for (int i = 0; i < d->rank; i++) sum += d->sure[width + i] * token[i];
    return sum;
}

/* the first of the largest; the most is sought in lanes, as all of a vocabulary goes through here */
static int largest(const float *x, int count) {
    float lanes[LANES], most = x[0];
    for (int k = 0; k < LANES; k++) lanes[k] = x[0];
    int whole = count / LANES * LANES;
    for (int i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; k++) lanes[k] = x[i + k] > lanes[k] ? x[i + k] : lanes[k];
    for (int k = 0; k < LANES; k++) most = lanes[k] > most ? lanes[k] : most;
    for (int i = whole; i < count; i++) most = x[i] > most ? x[i] : most;
    for (int i = 0; i < count; i++)
        if (x[i] == most) return i;
    return 0;
}

/* From place to place: logits of all blocks get what the token before says, and the likeliest is the draft. */
static void walk(const drafting *s, int thread, int threads) {
    const ls_block_drafter *d = s->d;
    const ls_batch *b = s->r->blocks;
    int first = ls_share(b->inputs, thread, threads), last = ls_share(b->inputs, thread + 1, threads);
    int width = d->decoder->width, outputs = d->markov->outputs;
    int64_t stride = (int64_t)d->places * outputs;
    ls_packed_rows x = ls_packed_at(d->markov, b->inputs, s->packed);
    for (int place = 0; place < d->places; place++) {
        for (int i = first; i < last; i++) ls_pack_rows(d->markov, &x, i, i + 1, before(s, i, place), 0);
        ls_barrier(threads);
        ls_multiply_shared(d->markov, &x, b->logits + (size_t)place * outputs, stride, 1, thread, threads);
        ls_barrier(threads);
        for (int i = first; i < last; i++) {
            int row = i * d->places + place;
            s->r->sure[row] = confidence(d, b->hidden + (size_t)row * width, before(s, i, place));
            s->r->drafts[row] = largest(b->logits + (size_t)row * outputs, outputs);
        }
    }
}

static void draft_body(void *context, int thread, int threads) {
    const drafting *s = context;
    if (s->r->context->rows) {
        fuse(s, thread, threads);
        keep(s, thread, threads);
    }
    enter(s, thread, threads);
    for (int i = 0; i < s->d->decoder->layers; i++) ls_run_block(&s->blocks, s->d->decoder->layer + i, thread, threads);
    ls_run_end(&s->blocks, thread, threads);
    walk(s, thread, threads);
}

/* workspace has `ls_block_draft_workspace` bytes and is 64-byte aligned. */
LS_API void ls_block_draft(const ls_block_drafter *d, const ls_block_round *r, void *workspace, int32_t threads) {
    char *at = workspace;
    drafting s = {.d = d, .r = r, .context = ls_run_at(d->decoder, r->context, at, threads)};
    at += ls_step_workspace(d->decoder, r->context, threads);
    s.blocks = ls_run_at(d->decoder, r->blocks, at, threads);
    s.packed = at + ls_step_workspace(d->decoder, r->blocks, threads);
    ls_parallel(draft_body, &s, threads, LS_SPIN_STEP);
}
