/* Written from kernels/cpu/structs.py, where it is changed; see there. */
#ifndef LINSPEC_STRUCTS_H
#define LINSPEC_STRUCTS_H

#include <stddef.h>
#include <stdint.h>

#define LS_ABI 7                             /* of this table and the functions */
#define LS_TILE 32                           /* output channels of a tile */
#define LS_GROUP 32                          /* inputs that share a scale in int4 weights */
#define LS_F32 0                             /* kinds of weights and of rows */
#define LS_BF16 1
#define LS_INT8 2
#define LS_INT4 3
#define LS_F16 5                             /* of rows of a state only */
#define LS_BLOCKS 4                          /* those of a GGUF file, in formats that go by the numbers they have there */
#define LS_Q4_0 2
#define LS_Q4_1 3
#define LS_Q5_0 6
#define LS_Q5_1 7
#define LS_Q8_0 8
#define LS_Q4_K 12
#define LS_Q5_K 13
#define LS_Q6_K 14
#define LS_IQ4_NL 20
#define LS_MAX_HEAD_WIDTH 512                /* features of a head */
#define LS_MAX_NODES 64                      /* staged nodes of a slot */

/* Rows of a weight matrix whose blocks have one format. */
typedef struct {
    int32_t format, outputs;
    const void *weights;                     /* in tiles, see blocks.h */
} ls_part;

/* One linear layer. Weights by kind, for every tile in turn:
 * f32, bf16  [inputs][32]
 * int8       [padded / 4][32][4] bytes of code + 128
 * int4       [padded / 32] groups of { bf16 scale [32], [4][32][4] bytes }: byte (q, c, i) has code
 *            + 8 of input 4 q + i in its low half and of input 16 + 4 q + i in its high half */
typedef struct {
    int32_t kind, inputs, outputs, padded;   /* padded: inputs rounded up to whole groups */
    const void *weights;
    const float *scales, *bias;              /* scales [tiles * 32] are for int8 only; bias may be null */
    int32_t parts;                           /* of a layer of blocks, whose `weights` is null */
    const ls_part *part;                     /* one below the other */
} ls_linear;

/* A block: what its mixer does, its weights, and where its state is. */
typedef struct {
    int64_t window, group, span;             /* nearest rows, rows of a group, exact groups; 0: all */
    int32_t state;                           /* kind of state, an index into `committed` of an input */
    int32_t squared_relu;                    /* weights relu(q.k)^2 of unit features instead of a softmax */
    int32_t taps, conv_history;              /* of the convolution; value rows before the first row */
    float alpha;                             /* factor on the sums */
    const float *conv_weights;               /* [heads][taps] */
    const float *mixer_norm, *mlp_norm, *q_norm, *k_norm; /* the last two may be null */
    const ls_linear *qkv, *out, *gate_up, *down;
    char *keys, *values;                     /* [slots][kv_heads][rows]; values behind conv_history more rows */
    const float *sums;                       /* [slots][kv_heads][head_width][head_width], null without */
    int64_t key_stride, value_stride;        /* bytes from one kv head to the next */
    int32_t row_kind, row_bytes;             /* LS_INT8: codes and a scale; bytes of a row */
} ls_layer;

/* A whole decoder. */
typedef struct {
    int32_t layers, width, heads, kv_heads, head_width, mlp_width, vocabulary;
    int32_t embedding_kind;                  /* LS_F32, LS_BF16 or LS_BLOCKS */
    float eps;                               /* of the norms */
    const void *embedding;                   /* [vocabulary][width]; of blocks an ls_part */
    const float *final_norm;
    const ls_linear *head;
    const ls_layer *layer;
} ls_decoder;

/* The new nodes of one slot. */
typedef struct {
    int32_t slot, first;                     /* first: the row of its first new node among those of the step */
    int32_t nodes, staged;                   /* new nodes; staged rows after this step, the new ones last */
    const int32_t *committed;                /* rows in each kind of state */
    const uint64_t *ancestors;               /* [staged]: bit i says that staged row i is seen */
} ls_step_input;

/* What one step is to compute, and where the results go. */
typedef struct {
    int32_t rows, inputs, outputs;           /* new nodes, slots that they are of, logits asked for */
    int32_t chained;                         /* inputs are pieces of one prompt, each behind the one before */
    const int32_t *tokens, *positions;       /* [rows]; positions are rows of the rotary table */
    const int32_t *output_rows;              /* [outputs] */
    const float *cosines, *sines;            /* [positions][head_width] */
    const ls_step_input *input;
    float *hidden, *logits;                  /* [outputs][width], [outputs][vocabulary] */
} ls_batch;

/* Medusa heads, see heads.c: x += W2 silu(W1 x + b) for every block, then the output layer. Where
 * `back` is null a block is x += silu(W1 x + b) and `inner` is `width`. All layers of one list are
 * alike. */
typedef struct {
    int32_t heads, blocks, width, inner, vocabulary;
    int32_t seen;                            /* floats that the first blocks read; the first `width` are added to */
    int32_t shared;                          /* all heads have the first output layer */
    const ls_linear *const *first;           /* [blocks][heads]: width -> inner */
    const ls_linear *const *back;            /* [blocks][heads]: inner -> width */
    const ls_linear *const *out;             /* [heads], or one */
} ls_heads;

/* What Medusa heads are asked. */
typedef struct {
    int32_t rows, heads, top;                /* the `top` likeliest tokens of the first `heads` heads */
    const float *const *hidden;              /* [rows]: where what is seen [seen] lies */
    int32_t *tokens;                         /* [rows][heads][top], likeliest first */
} ls_guess;

/* what `layout` of structs.py says, as this compiler has it */
#define LS_LAYOUT \
    424379742, \
    sizeof(ls_part), offsetof(ls_part, format), offsetof(ls_part, outputs), \
        offsetof(ls_part, weights), \
    sizeof(ls_linear), offsetof(ls_linear, kind), offsetof(ls_linear, inputs), \
        offsetof(ls_linear, outputs), offsetof(ls_linear, padded), \
        offsetof(ls_linear, weights), offsetof(ls_linear, scales), offsetof(ls_linear, bias), \
        offsetof(ls_linear, parts), offsetof(ls_linear, part), \
    sizeof(ls_layer), offsetof(ls_layer, window), offsetof(ls_layer, group), \
        offsetof(ls_layer, span), offsetof(ls_layer, state), \
        offsetof(ls_layer, squared_relu), offsetof(ls_layer, taps), \
        offsetof(ls_layer, conv_history), offsetof(ls_layer, alpha), \
        offsetof(ls_layer, conv_weights), offsetof(ls_layer, mixer_norm), \
        offsetof(ls_layer, mlp_norm), offsetof(ls_layer, q_norm), offsetof(ls_layer, k_norm), \
        offsetof(ls_layer, qkv), offsetof(ls_layer, out), offsetof(ls_layer, gate_up), \
        offsetof(ls_layer, down), offsetof(ls_layer, keys), offsetof(ls_layer, values), \
        offsetof(ls_layer, sums), offsetof(ls_layer, key_stride), \
        offsetof(ls_layer, value_stride), offsetof(ls_layer, row_kind), \
        offsetof(ls_layer, row_bytes), \
    sizeof(ls_decoder), offsetof(ls_decoder, layers), offsetof(ls_decoder, width), \
        offsetof(ls_decoder, heads), offsetof(ls_decoder, kv_heads), \
        offsetof(ls_decoder, head_width), offsetof(ls_decoder, mlp_width), \
        offsetof(ls_decoder, vocabulary), offsetof(ls_decoder, embedding_kind), \
        offsetof(ls_decoder, eps), offsetof(ls_decoder, embedding), \
        offsetof(ls_decoder, final_norm), offsetof(ls_decoder, head), \
        offsetof(ls_decoder, layer), \
    sizeof(ls_step_input), offsetof(ls_step_input, slot), offsetof(ls_step_input, first), \
        offsetof(ls_step_input, nodes), offsetof(ls_step_input, staged), \
        offsetof(ls_step_input, committed), offsetof(ls_step_input, ancestors), \
    sizeof(ls_batch), offsetof(ls_batch, rows), offsetof(ls_batch, inputs), \
        offsetof(ls_batch, outputs), offsetof(ls_batch, chained), offsetof(ls_batch, tokens), \
        offsetof(ls_batch, positions), offsetof(ls_batch, output_rows), \
        offsetof(ls_batch, cosines), offsetof(ls_batch, sines), offsetof(ls_batch, input), \
        offsetof(ls_batch, hidden), offsetof(ls_batch, logits), \
    sizeof(ls_heads), offsetof(ls_heads, heads), offsetof(ls_heads, blocks), \
        offsetof(ls_heads, width), offsetof(ls_heads, inner), offsetof(ls_heads, vocabulary), \
        offsetof(ls_heads, seen), offsetof(ls_heads, shared), offsetof(ls_heads, first), \
        offsetof(ls_heads, back), offsetof(ls_heads, out), \
    sizeof(ls_guess), offsetof(ls_guess, rows), offsetof(ls_guess, heads), \
        offsetof(ls_guess, top), offsetof(ls_guess, hidden), offsetof(ls_guess, tokens)

#endif
