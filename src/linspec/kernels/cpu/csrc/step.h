/* What the files of a decode step share: the decoder as a table, the new nodes, the run over them. */
#ifndef LINSPEC_STEP_H
#define LINSPEC_STEP_H

#include "kernels.h"

typedef struct {
    int64_t window, group, span;
    int32_t part;                  /* kind of state, an index into a feed's bases */
    int32_t squares, taps;
    int32_t lead;                  /* value rows before the origin */
    float alpha;
    const float *kernel;           /* [heads][taps] */
    const float *mixer_norm, *mlp_norm, *q_norm, *k_norm;
    const ls_linear *qkv, *out, *gate_up, *down;
    char *keys, *values;           /* [slots][kv_heads][rows][row bytes]; values with `lead` more rows */
    const float *sums;             /* [slots][kv_heads][width][width], null without */
    int64_t key_stride, value_stride; /* bytes from one kv head to the next */
    int32_t coded, row_bytes;      /* int8 codes with a scale, see coded.inc.h */
} ls_layer;

typedef struct {
    int32_t layers, width, heads, kv_heads, head_width, mlp_width, vocabulary;
    int32_t embed_kind;            /* LS_F32 or LS_BF16 */
    float eps;
    const void *embed;             /* [vocabulary][width] */
    const float *final_norm;
    const ls_linear *head;
    const ls_layer *layer;
} ls_decoder;

/* The new nodes of one slot; `bases` are its committed rows in each kind of state. */
typedef struct {
    int32_t slot, first, nodes, staged;
    const int32_t *bases;
    const uint64_t *ancestors;
} ls_feed;

typedef struct {
    int32_t rows, feeds, wanted;
    int32_t chained;               /* feeds are pieces of one sequence, each behind the one before */
    const int32_t *ids, *places;   /* [rows]: tokens and the rows of the rotary table */
    const int32_t *outputs;        /* [wanted]: rows whose logits are asked for */
    const float *cosines, *sines;  /* [places][head_width] */
    const ls_feed *feed;
    float *hidden, *logits;        /* [wanted][width], [wanted][vocabulary] */
} ls_batch;

typedef struct {
    const ls_decoder *d;
    const ls_batch *b;
    float *x, *wide, *mixed;       /* residual; outputs of qkv or gate_up; mixer outputs */
    float *partials;               /* of the mixers, see ls_ops; of a chain, what chain.c says */
    void *prepared;
} ls_run;

/* The mixer of one layer over the rows of one feed. */
ls_mixer ls_mixer_of(const ls_decoder *d, const ls_layer *l, const ls_feed *f);
/* Stage the keys and values of one feed in one kv head, and turn its queries into features. */
void ls_stage(const ls_run *s, const ls_layer *l, int feed, int head);

/* chain.c: floats of workspace, and every mixer of a layer (which ends without a barrier) */
size_t ls_chain_floats(const ls_decoder *d, const ls_batch *b);
void ls_mix_chain(const ls_run *s, const ls_layer *l, int thread, int threads);

#endif
