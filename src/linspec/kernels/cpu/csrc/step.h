/* What the files of a decode step share: one run over a decoder. */
#ifndef LINSPEC_STEP_H
#define LINSPEC_STEP_H

#include "kernels.h"

typedef struct {
    const ls_decoder *d;
    const ls_batch *b;
    float *x, *projected, *attended; /* residual; outputs of qkv or gate_up; mixer outputs */
    float *partials;                 /* of the mixers, see ls_ops; of a prompt, see prompt.c */
    void *packed;
} ls_run;

/* The mixer of one layer over the rows of one input. */
ls_mixer ls_mixer_of(const ls_decoder *d, const ls_layer *l, const ls_step_input *in);
/* Stage the keys and values of one input in one kv head, and turn its queries into features. */
void ls_stage(const ls_run *s, const ls_layer *l, int input, int head);

/* prompt.c: floats of workspace, and every mixer of a layer (which ends without a barrier) */
size_t ls_prompt_floats(const ls_decoder *d, const ls_batch *b);
void ls_mix_prompt(const ls_run *s, const ls_layer *l, int thread, int threads);

#endif
