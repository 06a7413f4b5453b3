/* What the files of a decode step share: one run over a decoder. */
#ifndef LINSPEC_STEP_H
#define LINSPEC_STEP_H

#include "lean.h"

typedef struct {
    const ls_decoder *d;
    const ls_batch *b;
    float *x, *projected, *attended; /* residual; outputs of qkv or up; mixer outputs */
    float *partials;                 /* of the mixers, see lean.c; of a prompt, see prompt.c */
    ls_line line;
    size_t far_floats;               /* see canvas.c */
    int32_t *lists;                  /* [rows][kv_heads][list_numbers]: what nodes selected, see positions.inc.h */
    int64_t list_numbers;
    void *packed;
} ls_run;

LS_API int64_t ls_step_workspace(const ls_decoder *d, const ls_batch *b, int32_t threads);
LS_API void ls_step(const ls_decoder *d, const ls_batch *b, void *workspace, int32_t threads);

/* The mixer of one kv head of a layer over the rows of one input, as if there were no other heads. */
ls_mixer ls_mixer_of(const ls_decoder *d, const ls_layer *l, const ls_step_input *in, int head);
/* stage.c: norm of x, whose weights begin `at` floats behind those of n */
void ls_apply_norm(const ls_norm *n, int64_t at, const float *x, float eps, int width, float *y);
/* Stage the keys and values of one input in one kv head, or put them where they belong, and turn its queries into features. */
void ls_stage(const ls_run *s, const ls_layer *l, int input, int head);

/* floats between the projections of one row and the next, and to the first query of a kv head */
static inline int64_t ls_projected_stride(const ls_decoder *d) {
    return (int64_t)(d->heads + 2 * d->kv_heads) * d->head_width;
}
static inline int64_t ls_query_column(const ls_decoder *d, int head) {
    return (int64_t)head * (d->heads / d->kv_heads) * d->head_width;
}

/* step.c, for whoever computes more around the blocks of a decoder. A run in a workspace of
 * `ls_step_workspace` bytes for at least as many threads, whose rows `x` the caller fills: */
ls_run ls_run_at(const ls_decoder *d, const ls_batch *b, void *workspace, int threads);
/* one block, which ends with a barrier; the hidden states that are asked for, and their logits */
void ls_run_block(const ls_run *s, const ls_layer *l, int thread, int threads);
void ls_run_end(const ls_run *s, int thread, int threads);
/* Norm (null: none) and pack the rows of this thread for `layer`; returns the packed rows. */
ls_packed_rows ls_pack_inputs(const ls_run *s, const ls_linear *layer, const ls_norm *norm, const float *x,
                              int rows, int thread, int threads);
/* Once all rows are packed: the tiles that this thread takes. Ends with a barrier. */
void ls_multiply(const ls_linear *layer, const ls_packed_rows *x, float *y, int add, int thread, int threads);
/* fuse.c: fill the rows `x` of a run with what is made of the target's states [rows][read]; `packed` has room for
 * its rows. Ends with a barrier. */
void ls_fuse(const ls_fusion *f, const ls_run *s, const float *const *states, void *packed, int thread, int threads);

/* lean.c: every mixer of a layer; ends without a barrier */
void ls_mix_inputs(const ls_run *s, const ls_layer *l, int thread, int threads);

/* select.c: Bring what judges the pages of one kv head of an input up to date, once its committed rows are there; of a
 * piece of a prompt, once all are staged, with the pages that its own rows complete. */
void ls_keep_judge(const ls_run *s, const ls_layer *l, int input, int head);
/* whether nodes select in one of its kv heads */
int ls_any_selected(const ls_run *s, const ls_layer *l);

/* positions.c: numbers of a list, at most; where the lists of one input and kv head are */
int64_t ls_list_numbers(const ls_decoder *d, const ls_batch *b);
void ls_place_lists(const ls_run *s, const ls_step_input *in, int head, ls_mixer *m);

/* what turns keys that are rebuilt */
static inline void ls_place_turns(const ls_run *s, const ls_layer *l, ls_mixer *m) {
    if (!m->chunk || l->rotary < 0) return;
    m->turned = s->d->turned[l->rotary];
    m->cosines = s->b->cosines[l->rotary], m->sines = s->b->sines[l->rotary];
}

/* whether inputs are pieces of what overwrites */
static inline int ls_over_pieces(const ls_batch *b) { return b->chained && b->input->overwritten; }

/* canvas.c: mixers of groups whose nodes overwrite. Floats of the sums that the nodes of one slot read in a kv head, at most,
 * and of all of them; these sums of a layer, once all rows are in place; what one input reads in a kv head then */
size_t ls_far_floats(const ls_decoder *d, const ls_batch *b);
size_t ls_canvas_floats(const ls_decoder *d, const ls_batch *b);
void ls_sum_canvases(const ls_run *s, const ls_layer *l, int thread, int threads);
void ls_read_canvas(const ls_run *s, const ls_layer *l, int input, int head);

/* prompt.c: floats of workspace, and every mixer of a layer (which ends without a barrier) */
size_t ls_prompt_floats(const ls_decoder *d, const ls_batch *b);
void ls_mix_prompt(const ls_run *s, const ls_layer *l, int thread, int threads);

#endif
