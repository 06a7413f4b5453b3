/* Written from kernels/cpu/structs.py, where it is changed; see there. */
#ifndef LINSPEC_STRUCTS_H
#define LINSPEC_STRUCTS_H

#include <stddef.h>
#include <stdint.h>

#define LS_ABI 21                            /* of this table and the functions */
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
#define LS_SILU 0
#define LS_GELU 1
#define LS_GELU_TANH 2
#define LS_RELU 3
#define LS_MAP_SAME 0
#define LS_MAP_UNIT 1
#define LS_MAP_RELU 2
#define LS_MAP_ELU_PLUS_1 3
#define LS_MAP_SOFTMAX 4
#define LS_MAP_TWO_SIDED 5
#define LS_MAP_POSITIVE 6
#define LS_MAP_PHASES 7
#define LS_MAP_SERIES 8
#define LS_WEIGHT_NONE 0
#define LS_WEIGHT_PRODUCTS 1
#define LS_WEIGHT_SOFTMAX 2
#define LS_WEIGHT_RELU2 3
#define LS_WEIGHT_EXPONENTIALS 4
#define LS_WEIGHT_COLLISIONS 5
#define LS_END_PLAIN 0
#define LS_END_QUOTIENT 1
#define LS_END_BOUNDED 2
#define LS_END_RMS 3
#define LS_END_UNIT 4
#define LS_MAX_HEAD_WIDTH 512                /* features of a head */
#define LS_MAX_NODES 64                      /* staged nodes of a slot */
#define LS_PAGE 64                           /* rows of a page */
#define LS_JUDGED 16                         /* rows that have a bound together */

/* Rows of a weight matrix whose blocks have one format. */
typedef struct {
    int32_t format, outputs;
    const void *weights;                     /* in tiles, see blocks.h */
} ls_linear_part;

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
    const ls_linear_part *part;              /* one below the other */
} ls_linear;

/* Sums of features, see summed.inc.h and the plan of this name. */
typedef struct {
    int32_t map, features, mapped;           /* LS_MAP_..; rows keep features */
    int32_t exact, end, together;            /* LS_WEIGHT_.., LS_END_..; one end for both parts */
    int32_t ones, fades, delta;              /* flags */
    int32_t gates;                           /* columns of a key row behind the key: logarithms, then a rate */
    float floor;                             /* of the end */
    const float *query_map, *key_map;        /* [..][map_rows][head_width] */
    int32_t map_rows, map_shared;            /* shared: all heads have one */
    const float *query_factors, *gain;       /* [heads], [head_width]; null without */
    const float *gate_map, *gate_scale;      /* [kv_heads][head_width][gates], or [kv_heads][head_width] */
    const float *gate_bias;                  /* [kv_heads][gates] */
    int32_t kept_groups, kept_rows;          /* in place of sums: rows of each of the last groups */
    const float *row_keys, *row_values;      /* [kept_rows][group]: what they are mixtures by */
} ls_summed;

/* The closed segments of a sequence in a layer, see shadow.inc.h; rows are as those of the state. */
typedef struct {
    int32_t segments;
    const int32_t *outliers;                 /* [kv_heads][segments * outliers]: numbers of chunks */
    const int32_t *regions;                  /* [segments]: places of their values; null: in this order */
    const char *left, *right;                /* [rows][rank], [segments][kv_heads][rank][head_width] */
    const char *landmarks;                   /* [kv_heads][chunks][head_width] */
    const char *outlier_keys, *outlier_values; /* [kv_heads][outliers of all][chunk] */
    const char *const *values;               /* where they lie now: [places][kv_heads][rows of a segment] */
} ls_past;

/* KV heads of a layer that read alike, and where their state is. */
typedef struct {
    const ls_summed *summed;                 /* null: attention */
    int64_t window, group, span;             /* nearest rows, rows of a group, exact groups; 0: all */
    int64_t far_group, far_span;             /* rows ahead of so many groups are *far* ones; 0: none are */
    int32_t rebuilt;                         /* far keys are read as rebuilt.inc.h says */
    float threshold;                         /* of these */
    int32_t positions;                       /* far ones that a node selects or reads, see positions.inc.h; or 0 */
    int32_t selects;                         /* it reads all rows, and selects for later layers */
    int32_t sinks;                           /* first rows of the text, seen from everywhere */
    int32_t state;                           /* kind of state, an index into `committed` of an input */
    int32_t squared_relu;                    /* weights relu(q.k)^2 of unit features instead of a softmax */
    int32_t kv_heads;                        /* of this part */
    int32_t conv_history;                    /* value rows before the first row */
    float alpha;                             /* factor on the sums */
    const float *bias;                       /* [heads of this part][bias_distances], null without */
    int32_t bias_distances;                  /* the last one is for all greater ones */
    char *keys, *values;                     /* [slots][kv_heads][rows]; values behind conv_history more rows */
    const float *sums;                       /* [slots][kv_heads][sum_floats], null without */
    int64_t sum_floats;                      /* features x value columns; with sinks [sinks][2 * head_width + 1]: bytes of rows, and a 1; with a budget [budget][2 * head_width + 1]: a key, a value, and what it is worth, 0 for none */
    int64_t key_stride, value_stride;        /* bytes from one kv head to the next */
    int32_t row_kind;                        /* LS_F32, LS_BF16, LS_F16, LS_INT8: codes and a scale, or LS_INT4 */
    int32_t row_bytes, value_bytes;          /* of a row of keys and of values, alike but for sums and for keys with queries behind them */
    const char *const *const *pages;         /* [slots]: pages with the first rows of a slot, whose others are in keys and values; or null */
    const int32_t *paged;                    /* [slots]: how many rows are in pages */
    int64_t page_keys, page_values;          /* bytes to [kv_heads][LS_PAGE] rows in a page */
    int32_t chosen;                          /* groups ahead of the span that a node reads, see select.inc.h; or 0 */
    int32_t coded;                           /* they are judged by codes of LS_PAGE rows, not bounds of LS_JUDGED */
    uint16_t *judge;                         /* [slots][kv_heads]: the codes or bounds of all pages */
    int64_t judge_stride;                    /* numbers from one kv head to the next */
    int32_t *judged;                         /* [slots][kv_heads]: how many of these pages have theirs */
    float *group_sums;                       /* [slots][kv_heads][group_room][sum_floats]: of each group of a canvas, see canvas.c; or null */
    int32_t *group_rows;                     /* [slots][kv_heads][group_room]: of how many rows; 0: not made */
    int32_t group_room;                      /* groups that there is room for */
    int32_t budget, asked, pool;             /* rows that stay of closed groups, where others have sums, see evicting.inc.h; budget 0: none */
    int32_t rank, chunk, outliers, marked;   /* of closed segments: of their keys, rows of a chunk, chunks of each that all see, others that a node selects, see shadow.inc.h; chunk 0: there are none */
    const ls_past *past;                     /* [slots][2]: those now, and once more have closed, which nodes see that do not see the first row */
    int32_t left_bytes;                      /* of a row of their left factors */
} ls_mixer_part;

/* x * weight / sqrt(mean(x^2) + eps) + bias. */
typedef struct {
    const float *weight, *bias;              /* bias may be null */
    int32_t centred;                         /* the mean is taken off first, as a LayerNorm does */
} ls_norm;

/* A block: what the parts of its mixer do, and its weights. */
typedef struct {
    const ls_mixer_part *part;
    const int32_t *part_of, *place;          /* [kv_heads]: its part, and its number there */
    int32_t taps;                            /* of the convolution */
    const float *conv_weights;               /* [heads][taps] */
    const ls_norm *mixer_norm, *mlp_norm;    /* of what goes in; null: none */
    const ls_norm *mixer_out_norm, *mlp_out_norm; /* of what comes out; null: none */
    const ls_norm *q_norm, *k_norm;          /* null: none */
    int32_t whole_norms;                     /* those of q and k are over the projections of all heads */
    int32_t norm_stride;                     /* floats from a head's weights to the next; 0: all have one */
    int32_t rotary;                          /* table of its positions, -1: none */
    int32_t parallel;                        /* the MLP reads what enters the block, as the mixer does */
    const ls_linear *qkv, *out;              /* null: the mixer is left out */
    const ls_linear *up, *down;              /* up: with a gate, of both, the gate first; null: no MLP */
} ls_layer;

/* A whole decoder. */
typedef struct {
    int32_t layers, width, heads, kv_heads, head_width, mlp_width, vocabulary;
    int32_t embedding_kind;                  /* LS_F32, LS_BF16 or LS_BLOCKS */
    int32_t activation, gated;               /* LS_SILU, ..; whether it gates other outputs */
    float eps;                               /* of the norms */
    float score_factor;                      /* on q.k / sqrt(head_width) ahead of a softmax */
    float score_cap;                         /* on these then; 0 is none */
    float embedding_scale, residual_scale, logit_scale, logit_cap;
    const void *embedding;                   /* [vocabulary][width]; of blocks an ls_linear_part */
    const float *position_rows;              /* [positions][width], added to it; null without */
    const int32_t *turned;                   /* features of a head that each rotary table turns */
    const ls_norm *final_norm;
    const ls_norm *token_norm;               /* nodes have given states, and mixers read the token's embedding beside them; null: not so */
    const ls_linear *head;
    const ls_layer *layer;
} ls_decoder;

/* The new nodes of one slot. */
typedef struct {
    int32_t slot, first;                     /* first: the row of its first new node among those of the step */
    int32_t nodes, staged;                   /* new nodes; staged rows after this step, the new ones last */
    const int32_t *committed;                /* rows in each kind of state */
    const uint64_t *ancestors;               /* [staged]: bit i says that staged row i is seen */
    const int32_t *overwritten;              /* [nodes]: committed rows that they replace, seeing all of them; null: they are staged */
    const int32_t *behind;                   /* slots of the branches behind this one */
    const int32_t *carried;                  /* [nodes]: in how many of them the row that a node replaces stands too; null: in none */
} ls_step_input;

/* What one step is to compute, and where the results go. */
typedef struct {
    int32_t rows, inputs, outputs;           /* new nodes, slots that they are of, logits asked for */
    int32_t chained;                         /* inputs are pieces, which read what others of their slot write */
    const int32_t *tokens, *positions;       /* [rows]; positions are rows of the tables */
    const float *const *given;               /* [rows]: in place of embeddings; null for none, or of a row */
    const int32_t *output_rows;              /* [outputs] */
    const float *const *cosines;             /* of each rotary table: [positions][turned] */
    const float *const *sines;               /* alike */
    const ls_step_input *input;
    float *hidden, *logits;                  /* [outputs][width], [outputs][vocabulary] */
    int32_t layers;                          /* how many layers' states are handed out */
    const int32_t *layer_numbers;            /* [layers], ascending */
    float *layer_states;                     /* [layers][rows][width]: what those layers put out */
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

/* What makes one state of those of several layers, see fuse.c. */
typedef struct {
    int32_t read;                            /* layers of the target whose states are read */
    const ls_norm *const *norm;              /* [read]; null: none */
    const ls_linear *layer;                  /* [read * width] -> width */
    const ls_norm *out_norm;                 /* of what comes out; null: none */
} ls_fusion;

/* A block drafter, see block_draft.c. */
typedef struct {
    const ls_decoder *decoder;               /* its layers and norm; head: what is drafted */
    int32_t places, rank;                    /* places of a block; see `markov` */
    const ls_fusion *fusion;                 /* makes rows of context */
    const float *masks;                      /* [places][width] */
    const ls_linear *markov;                 /* [rank] -> as many as the head has */
    const float *before;                     /* [outputs][rank]: what `markov` reads of a drafted token */
    const float *sure;                       /* [width + rank], then a bias */
} ls_block_drafter;

/* What a block drafter is asked. Context and blocks have the same slots in the same order. */
typedef struct {
    const ls_batch *context;                 /* the rows that its state lacks, behind which it reads */
    const ls_batch *blocks;                  /* a block for each input */
    const float *const *states;              /* [rows of context][read]: [width] each */
    const float *roots, *before;             /* [inputs][width], [inputs][rank]: of the newest tokens */
    float *newest;                           /* [slots][width]: the last row of context of each */
    int32_t *drafts;                         /* [inputs][places]: outputs of the head */
    float *sure;                             /* [inputs][places]: logits of the confidences */
} ls_block_round;

/* Groups that close in a state, see evict.c. */
typedef struct {
    int32_t heads, repeats, width, rows;     /* kv heads, query heads of each; rows that close */
    int32_t group, budget, asked, pool;      /* as in ls_mixer_part */
    float score_factor, score_cap;           /* as in ls_decoder */
    const float *keys, *values;              /* [heads][rows]: keys [1 + repeats][width], queries last */
    float *kept;                             /* [heads][budget][2 * width + 1] */
} ls_eviction;

/* What the trees of some sequences grow from, and what they become; see grow.c. */
typedef struct {
    int32_t sequences, top, levels;          /* top: children of a node, and nodes of a level that get some */
    int32_t normed;                          /* drafts go on from normalized states */
    const ls_batch *fresh;                   /* entries that are made first, [inputs]; null: none */
    const ls_fusion *fusion;                 /* makes the states of these */
    const float *const *read_states;         /* [rows of fresh][read]: [width] each */
    float *ends, *end_shares;                /* [slots][width], [slots][top]: what the newest entry of a slot says, written by fresh ones */
    int32_t *end_tokens;                     /* [slots][top]: the children of the root; shares: logarithms */
    const int32_t *slots, *committed;        /* [sequences]: the rows of each in the state, fresh ones too */
    const int32_t *nodes, *depths;           /* [sequences]: the largest tree of each, levels deep at most */
    const int32_t *ids;                      /* [vocabulary]: the tokens that can be drafted */
    const float *const *cosines;             /* as in ls_batch */
    const float *const *sines;               /* alike */
    int32_t *tokens, *parents;               /* [sequences][LS_MAX_NODES] */
    float *shares;                           /* alike: how likely each is behind its parent; logarithms */
    int32_t *found;                          /* [sequences]: draft nodes of each tree */
} ls_growth;

/* what `layout` of structs.py says, as this compiler has it */
#define LS_LAYOUT \
    1175578112, \
    sizeof(ls_linear_part), offsetof(ls_linear_part, format), \
        offsetof(ls_linear_part, outputs), offsetof(ls_linear_part, weights), \
    sizeof(ls_linear), offsetof(ls_linear, kind), offsetof(ls_linear, inputs), \
        offsetof(ls_linear, outputs), offsetof(ls_linear, padded), \
        offsetof(ls_linear, weights), offsetof(ls_linear, scales), offsetof(ls_linear, bias), \
        offsetof(ls_linear, parts), offsetof(ls_linear, part), \
    sizeof(ls_summed), offsetof(ls_summed, map), offsetof(ls_summed, features), \
        offsetof(ls_summed, mapped), offsetof(ls_summed, exact), offsetof(ls_summed, end), \
        offsetof(ls_summed, together), offsetof(ls_summed, ones), offsetof(ls_summed, fades), \
        offsetof(ls_summed, delta), offsetof(ls_summed, gates), offsetof(ls_summed, floor), \
        offsetof(ls_summed, query_map), offsetof(ls_summed, key_map), \
        offsetof(ls_summed, map_rows), offsetof(ls_summed, map_shared), \
        offsetof(ls_summed, query_factors), offsetof(ls_summed, gain), \
        offsetof(ls_summed, gate_map), offsetof(ls_summed, gate_scale), \
        offsetof(ls_summed, gate_bias), offsetof(ls_summed, kept_groups), \
        offsetof(ls_summed, kept_rows), offsetof(ls_summed, row_keys), \
        offsetof(ls_summed, row_values), \
    sizeof(ls_past), offsetof(ls_past, segments), offsetof(ls_past, outliers), \
        offsetof(ls_past, regions), offsetof(ls_past, left), offsetof(ls_past, right), \
        offsetof(ls_past, landmarks), offsetof(ls_past, outlier_keys), \
        offsetof(ls_past, outlier_values), offsetof(ls_past, values), \
    sizeof(ls_mixer_part), offsetof(ls_mixer_part, summed), offsetof(ls_mixer_part, window), \
        offsetof(ls_mixer_part, group), offsetof(ls_mixer_part, span), \
        offsetof(ls_mixer_part, far_group), offsetof(ls_mixer_part, far_span), \
        offsetof(ls_mixer_part, rebuilt), offsetof(ls_mixer_part, threshold), \
        offsetof(ls_mixer_part, positions), offsetof(ls_mixer_part, selects), \
        offsetof(ls_mixer_part, sinks), offsetof(ls_mixer_part, state), \
        offsetof(ls_mixer_part, squared_relu), offsetof(ls_mixer_part, kv_heads), \
        offsetof(ls_mixer_part, conv_history), offsetof(ls_mixer_part, alpha), \
        offsetof(ls_mixer_part, bias), offsetof(ls_mixer_part, bias_distances), \
        offsetof(ls_mixer_part, keys), offsetof(ls_mixer_part, values), \
        offsetof(ls_mixer_part, sums), offsetof(ls_mixer_part, sum_floats), \
        offsetof(ls_mixer_part, key_stride), offsetof(ls_mixer_part, value_stride), \
        offsetof(ls_mixer_part, row_kind), offsetof(ls_mixer_part, row_bytes), \
        offsetof(ls_mixer_part, value_bytes), offsetof(ls_mixer_part, pages), \
        offsetof(ls_mixer_part, paged), offsetof(ls_mixer_part, page_keys), \
        offsetof(ls_mixer_part, page_values), offsetof(ls_mixer_part, chosen), \
        offsetof(ls_mixer_part, coded), offsetof(ls_mixer_part, judge), \
        offsetof(ls_mixer_part, judge_stride), offsetof(ls_mixer_part, judged), \
        offsetof(ls_mixer_part, group_sums), offsetof(ls_mixer_part, group_rows), \
        offsetof(ls_mixer_part, group_room), offsetof(ls_mixer_part, budget), \
        offsetof(ls_mixer_part, asked), offsetof(ls_mixer_part, pool), \
        offsetof(ls_mixer_part, rank), offsetof(ls_mixer_part, chunk), \
        offsetof(ls_mixer_part, outliers), offsetof(ls_mixer_part, marked), \
        offsetof(ls_mixer_part, past), offsetof(ls_mixer_part, left_bytes), \
    sizeof(ls_norm), offsetof(ls_norm, weight), offsetof(ls_norm, bias), \
        offsetof(ls_norm, centred), \
    sizeof(ls_layer), offsetof(ls_layer, part), offsetof(ls_layer, part_of), \
        offsetof(ls_layer, place), offsetof(ls_layer, taps), \
        offsetof(ls_layer, conv_weights), offsetof(ls_layer, mixer_norm), \
        offsetof(ls_layer, mlp_norm), offsetof(ls_layer, mixer_out_norm), \
        offsetof(ls_layer, mlp_out_norm), offsetof(ls_layer, q_norm), \
        offsetof(ls_layer, k_norm), offsetof(ls_layer, whole_norms), \
        offsetof(ls_layer, norm_stride), offsetof(ls_layer, rotary), \
        offsetof(ls_layer, parallel), offsetof(ls_layer, qkv), offsetof(ls_layer, out), \
        offsetof(ls_layer, up), offsetof(ls_layer, down), \
    sizeof(ls_decoder), offsetof(ls_decoder, layers), offsetof(ls_decoder, width), \
        offsetof(ls_decoder, heads), offsetof(ls_decoder, kv_heads), \
        offsetof(ls_decoder, head_width), offsetof(ls_decoder, mlp_width), \
        offsetof(ls_decoder, vocabulary), offsetof(ls_decoder, embedding_kind), \
        offsetof(ls_decoder, activation), offsetof(ls_decoder, gated), \
        offsetof(ls_decoder, eps), offsetof(ls_decoder, score_factor), \
        offsetof(ls_decoder, score_cap), offsetof(ls_decoder, embedding_scale), \
        offsetof(ls_decoder, residual_scale), offsetof(ls_decoder, logit_scale), \
        offsetof(ls_decoder, logit_cap), offsetof(ls_decoder, embedding), \
        offsetof(ls_decoder, position_rows), offsetof(ls_decoder, turned), \
        offsetof(ls_decoder, final_norm), offsetof(ls_decoder, token_norm), \
        offsetof(ls_decoder, head), offsetof(ls_decoder, layer), \
    sizeof(ls_step_input), offsetof(ls_step_input, slot), offsetof(ls_step_input, first), \
        offsetof(ls_step_input, nodes), offsetof(ls_step_input, staged), \
        offsetof(ls_step_input, committed), offsetof(ls_step_input, ancestors), \
        offsetof(ls_step_input, overwritten), offsetof(ls_step_input, behind), \
        offsetof(ls_step_input, carried), \
    sizeof(ls_batch), offsetof(ls_batch, rows), offsetof(ls_batch, inputs), \
        offsetof(ls_batch, outputs), offsetof(ls_batch, chained), offsetof(ls_batch, tokens), \
        offsetof(ls_batch, positions), offsetof(ls_batch, given), \
        offsetof(ls_batch, output_rows), offsetof(ls_batch, cosines), \
        offsetof(ls_batch, sines), offsetof(ls_batch, input), offsetof(ls_batch, hidden), \
        offsetof(ls_batch, logits), offsetof(ls_batch, layers), \
        offsetof(ls_batch, layer_numbers), offsetof(ls_batch, layer_states), \
    sizeof(ls_heads), offsetof(ls_heads, heads), offsetof(ls_heads, blocks), \
        offsetof(ls_heads, width), offsetof(ls_heads, inner), offsetof(ls_heads, vocabulary), \
        offsetof(ls_heads, seen), offsetof(ls_heads, shared), offsetof(ls_heads, first), \
        offsetof(ls_heads, back), offsetof(ls_heads, out), \
    sizeof(ls_guess), offsetof(ls_guess, rows), offsetof(ls_guess, heads), \
        offsetof(ls_guess, top), offsetof(ls_guess, hidden), offsetof(ls_guess, tokens), \
    sizeof(ls_fusion), offsetof(ls_fusion, read), offsetof(ls_fusion, norm), \
        offsetof(ls_fusion, layer), offsetof(ls_fusion, out_norm), \
    sizeof(ls_block_drafter), offsetof(ls_block_drafter, decoder), \
        offsetof(ls_block_drafter, places), offsetof(ls_block_drafter, rank), \
        offsetof(ls_block_drafter, fusion), offsetof(ls_block_drafter, masks), \
        offsetof(ls_block_drafter, markov), offsetof(ls_block_drafter, before), \
        offsetof(ls_block_drafter, sure), \
    sizeof(ls_block_round), offsetof(ls_block_round, context), \
        offsetof(ls_block_round, blocks), offsetof(ls_block_round, states), \
        offsetof(ls_block_round, roots), offsetof(ls_block_round, before), \
        offsetof(ls_block_round, newest), offsetof(ls_block_round, drafts), \
        offsetof(ls_block_round, sure), \
    sizeof(ls_eviction), offsetof(ls_eviction, heads), offsetof(ls_eviction, repeats), \
        offsetof(ls_eviction, width), offsetof(ls_eviction, rows), \
        offsetof(ls_eviction, group), offsetof(ls_eviction, budget), \
        offsetof(ls_eviction, asked), offsetof(ls_eviction, pool), \
        offsetof(ls_eviction, score_factor), offsetof(ls_eviction, score_cap), \
        offsetof(ls_eviction, keys), offsetof(ls_eviction, values), \
        offsetof(ls_eviction, kept), \
    sizeof(ls_growth), offsetof(ls_growth, sequences), offsetof(ls_growth, top), \
        offsetof(ls_growth, levels), offsetof(ls_growth, normed), offsetof(ls_growth, fresh), \
        offsetof(ls_growth, fusion), offsetof(ls_growth, read_states), \
        offsetof(ls_growth, ends), offsetof(ls_growth, end_shares), \
        offsetof(ls_growth, end_tokens), offsetof(ls_growth, slots), \
        offsetof(ls_growth, committed), offsetof(ls_growth, nodes), \
        offsetof(ls_growth, depths), offsetof(ls_growth, ids), offsetof(ls_growth, cosines), \
        offsetof(ls_growth, sines), offsetof(ls_growth, tokens), \
        offsetof(ls_growth, parents), offsetof(ls_growth, shares), \
        offsetof(ls_growth, found)

#endif
