/* Interface of linspec's CPU kernels, and what their files share.
 *
 * Words: a *tile* is 32 neighbouring output channels, whose weights lie interleaved so that one
 * vector register holds several channels. A *block* is 1..8 input rows that meet a tile at once.
 * Rows never meet each other: what is computed for one row, and in which order, does not depend on
 * how many rows are there. That makes speculation lossless bit for bit.
 */
#ifndef LINSPEC_KERNELS_H
#define LINSPEC_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define LS_API __attribute__((visibility("default")))
#define LS_TILE 32   /* output channels of a tile */
#define LS_ROWS 8    /* most rows of a block */
#define LS_GROUP 32  /* inputs that share a scale in int4 weights */
#define LS_INT4_BYTES 576 /* of one group of one tile: 32 scales, 512 packed bytes */
#define LS_MIX_FLOATS 32 /* of scratch for a query, see ls_mix_scratch */
#define LS_CHUNK 1024 /* rows within reach whose sums are made apart: threads share out long caches so */
#define LS_ABI 5     /* raised with every change of what Python relies on */

enum ls_kind { LS_F32 = 0, LS_BF16 = 1, LS_INT8 = 2, LS_INT4 = 3 };

/* One linear layer. Weights by kind, for every tile in turn:
 *   f32, bf16  [inputs][32]
 *   int8       [padded / 4][32][4] bytes of code + 128
 *   int4       [padded / 32] groups of { bf16 scale [32], [4][32][4] bytes }: byte (q, c, i) has code
 *              + 8 of input 4 q + i in its low half and of input 16 + 4 q + i in its high half
 * `padded` is `inputs` rounded up to 32. scales [tiles * 32] is for int8 only. bias may be null. */
typedef struct {
    int32_t kind, inputs, outputs, padded;
    const void *weights;
    const float *scales, *bias;
} ls_linear;

/* Medusa heads, see heads.c: x += W2 silu(W1 x + b) for every block, then the output layer. Where `back` is
 * null a block is x += silu(W1 x + b) and `inner` is `width`. All layers of one list are alike. */
typedef struct {
    int32_t heads, blocks, width, inner, vocabulary;
    int32_t shared;                /* all heads have the first output layer */
    const ls_linear *const *first; /* [blocks][heads]: width -> inner */
    const ls_linear *const *back;  /* [blocks][heads]: inner -> width */
    const ls_linear *const *out;   /* [heads], or one */
} ls_heads;

/* What is asked: the `top` likeliest tokens of the first `heads` heads. */
typedef struct {
    int32_t rows, heads, top;
    const float *const *hidden; /* [rows]: where each hidden state [width] is */
    int32_t *tokens;            /* [rows][heads][top], likeliest first */
} ls_guess;

/* Rows as the tiles want them. codes: for each block [padded / 4][rows of block][4] (int8) or
 * [inputs][rows of block] floats. offsets: what the unsigned weights add too much, negated; for each
 * block [rows] (int8) or [padded / 32][rows] (int4). scales [rows]. */
typedef struct {
    int32_t rows;
    void *codes;
    int32_t *offsets;
    float *scales;
} ls_rows;

/* One mixer over the rows of one slot; see attention.inc.h. */
typedef struct {
    int32_t heads, kv_heads, width; /* width of a head */
    int32_t base;                   /* committed rows that every node sees */
    int32_t staged, nodes;          /* staged rows after this step; new nodes, the last of them */
    int32_t closed;                 /* first rows that the sums hold already */
    int64_t window;                 /* nearest rows that a node sees; 0 is all */
    int64_t group, span;            /* rows of a group, groups within reach; group 0 is all rows */
    int32_t squares;                /* weights relu(q.k)^2 of unit features instead of a softmax */
    int32_t taps;                   /* of the convolution over values; the rows before the first one
                                       lie before `values` */
    float alpha;                    /* factor on the sums */
    const float *kernel;            /* [heads][taps] */
    int32_t coded, row_bytes;         /* rows are int8 codes and a scale, see coded.inc.h; of a row */
    int64_t key_stride, value_stride; /* bytes from one kv head to the next */
    const char *keys, *values;        /* [kv_heads][rows][row_bytes] */
    const float *sums;                /* [kv_heads][width][width], null without */
    const uint64_t *ancestors;        /* [staged]: bit i says that staged row i is seen */
} ls_mixer;

static inline size_t ls_mix_queries(const ls_mixer *m) {
    return (size_t)m->nodes * (size_t)(m->heads / m->kv_heads);
}
static inline size_t ls_mix_scratch(const ls_mixer *m) {
    return ls_mix_queries(m) * (LS_MIX_FLOATS * sizeof(float) + (size_t)((m->width + 31) & ~31));
}
/* floats of the partial sums of one kv head and chunk */
static inline size_t ls_mix_partial(const ls_mixer *m) {
    return ls_mix_queries(m) * (size_t)(m->width + 2);
}
/* chunks that the rows within reach of a node may fill */
static inline int ls_mix_chunks(const ls_mixer *m) {
    int64_t most = (int64_t)m->base + m->staged;
    if (m->window && m->window < most) most = m->window;
    if (m->group && m->group * m->span < most) most = m->group * m->span;
    return (int)((most + LS_CHUNK - 1) / LS_CHUNK);
}

/* What becomes of the sums of a tile: y [rows][stride] = sums * scale of row * scale of channel + bias,
 * plus what is in y if `add`. Null pointers stand for ones and zeros. */
typedef struct {
    const float *row_scales, *channel_scales, *bias;
    int64_t stride;
    int width, add; /* width: channels that exist, at most 32 */
} ls_finish;

/* Everything that is written once for each instruction set. */
typedef struct {
    const char *name;
    /* one tile times `rows` rows: out [rows][32] */
    void (*int8)(const uint8_t *w, const int8_t *x, const int32_t *offsets, int quads, int rows,
                 float *out);
    void (*int4)(const uint8_t *w, const int8_t *x, const int32_t *offsets, int groups, int rows,
                 float *out);
    void (*f32)(const float *w, const float *x, int inputs, int rows, float *out);
    void (*bf16)(const uint16_t *w, const float *x, int inputs, int rows, float *out);
    /* row x as the tiles want it: every `size`-th four codes (or float) of `codes`; returns its scale.
     * offsets: what unsigned weights add too much, negated, of every group or (each = 0) of the row */
    float (*put_codes)(const float *x, int width, int padded, int size, int each, int8_t *codes,
                       int32_t *offsets);
    void (*put_floats)(const float *x, int width, int size, float *to);
    /* the end of a tile: see ls_finish */
    void (*finish)(const ls_finish *to, int rows, const float *sums, float *y);
    /* y = x * weight / sqrt(mean(x^2) + eps) */
    void (*rms_norm)(const float *x, const float *weight, float eps, int width, float *y);
    /* y = silu(gate) * up */
    void (*silu_mul)(const float *gate, const float *up, int width, float *y);
    /* x / |x| in place */
    void (*unit)(float *x, int width);
    /* What the queries of kv head `head` read from the rows of a chunk; q [nodes][stride], heads side by
     * side. partial: for every node and query head of a kv head a sum [width], then for each of these
     * what its softmax has seen, two floats. scratch: ls_mix_scratch bytes. */
    void (*near)(const ls_mixer *m, int head, int chunk, const float *q, int64_t q_stride,
                 float *partial, void *scratch);
    /* the partial sums of all chunks put together, and what else there is to read: out as q */
    void (*gather)(const ls_mixer *m, int head, int chunks, const float *q, int64_t q_stride,
                   float *partials, float *out, int64_t out_stride, void *scratch);
    /* sums [width][width] += what the rows first .. last - 1 of a kv head come to once they are closed */
    void (*fold)(const ls_mixer *m, int head, int first, int last, float *sums);
} ls_ops;

extern const ls_ops ls_ops_portable;
#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define LS_HAVE_AVXVNNI
#endif
#if defined(__x86_64__)
extern const ls_ops ls_ops_avx2, ls_ops_avx512;
#ifdef LS_HAVE_AVXVNNI
extern const ls_ops ls_ops_avxvnni;
#endif
#endif
#if defined(__aarch64__)
extern const ls_ops ls_ops_neon;
#endif

/* dispatch.c */
const ls_ops *ls_current(void);

/* pool.c: `body(context, thread, threads)` on every thread of the pool, the caller being thread 0.
 * spin_ns: how long the threads wait awake for the next call. After a step or a draft that is longer than
 * Python needs until the next one; after a single layer it is short, as torch's operators come between. */
#define LS_SPIN_STEP 250000
#define LS_SPIN_LAYER 60000
typedef void (*ls_body)(void *context, int thread, int threads);
void ls_parallel(ls_body body, void *context, int threads, int spin_ns);
void ls_barrier(int threads); /* inside a body only */
void *ls_scratch(size_t bytes); /* aligned memory of the calling thread, valid until its next call */

/* bytes or floats, rounded up to what the parts of a workspace begin at */
static inline size_t ls_up64(size_t n) { return (n + 63) & ~(size_t)63; }

/* linear.c */
size_t ls_rows_bytes(const ls_linear *layer, int rows);
ls_rows ls_rows_at(const ls_linear *layer, int rows, void *memory);
void ls_rows_fill(const ls_linear *layer, const ls_rows *to, int first, int last, const float *x,
                  int64_t stride);
void ls_tiles(const ls_linear *layer, const ls_rows *x, int first, int last, float *y,
              int64_t stride, int add);
static inline int ls_tile_count(const ls_linear *layer) {
    return (layer->outputs + LS_TILE - 1) / LS_TILE;
}
/* the share of `count` that belongs to `thread` */
static inline int ls_share(int count, int thread, int threads) {
    return (int)((int64_t)count * thread / threads);
}

#endif
