/* Interface of linspec's CPU kernels, and what their files share.
 *
 * Words: a *tile* is 32 neighbouring output channels, whose weights lie interleaved so that one
 * vector register holds several channels. A *block* is 1..8 input rows that are
 * multiplied by a tile at once. Rows are independent: what is computed for one row, and in which order,
 * does not depend on how many rows there are. That makes speculation lossless bit for bit.
 */
#ifndef LINSPEC_KERNELS_H
#define LINSPEC_KERNELS_H

#include "structs.h"

#define LS_API __attribute__((visibility("default")))
#define LS_ROWS 8    /* most rows of a block */
#define LS_INT4_BYTES 576 /* of one group of one tile: 32 scales, 512 packed bytes */
#define LS_QUERY_FLOATS 32 /* of scratch for a query, see ls_attend_scratch_bytes */
#define LS_CHUNK 1024 /* exact rows whose sums are made apart: threads share out long caches so */

/* Input rows in the order in which tiles read them. codes: for each block [padded / 4][rows of block][4] (int8) or
 * [inputs][rows of block] floats. offsets: what the unsigned weights add too much, negated; for each
 * block [rows] (int8) or [padded / 32][rows] (int4). scales [rows]. */
typedef struct {
    int32_t rows;
    void *codes;
    int32_t *offsets;
    float *scales;
} ls_packed_rows;

/* One mixer over the rows of one slot; see attention.inc.h. The rest is as in ls_layer. */
typedef struct {
    int32_t heads, kv_heads, width;   /* width of a head */
    int32_t committed;                /* committed rows, which every node sees */
    int32_t staged, nodes;            /* staged rows after this step; new nodes, the last of them */
    int32_t summed;                   /* first rows that the sums hold already */
    int64_t window, group, span;
    int32_t squared_relu;
    float score_scale, score_cap;     /* on q.k ahead of a softmax; a cap of 0 is none */
    int32_t taps;                     /* the values of the rows before the first lie before `values` */
    float alpha;
    const float *conv_weights;        /* [heads][taps] */
    int32_t quantized, row_bytes;     /* of a row */
    int64_t key_stride, value_stride; /* bytes from one kv head to the next */
    const char *keys, *values;        /* [kv_heads][rows][row_bytes] */
    const float *sums;                /* [kv_heads][width][width], null without */
    const ls_summed *form;            /* null: attention. The rest is then null, or of its kv head: */
    const float *query_map, *key_map, *query_factors, *gate_map, *gate_scale, *gate_bias;
    int32_t value_bytes;              /* of a row of values */
    int32_t sinks;                    /* first rows of the text, which every node sees */
    const float *sink_rows;           /* [sinks][2 width + 1]: key, value, 1; null while they are rows */
    const uint64_t *ancestors;        /* [staged]: bit i says that staged row i is seen */
} ls_mixer;

static inline size_t ls_query_count(const ls_mixer *m) {
    return (size_t)m->nodes * (size_t)(m->heads / m->kv_heads);
}
static inline size_t ls_attend_scratch_bytes(const ls_mixer *m) {
    size_t query = LS_QUERY_FLOATS * sizeof(float) + (size_t)((m->width + 31) & ~31);
    size_t sinks = m->sink_rows ? (size_t)m->sinks * 2 * (size_t)m->width : 0;
    return ls_query_count(m) * query + sinks * sizeof(float);
}
static inline size_t ls_summed_scratch_bytes(const ls_mixer *m) {
    size_t rows = (size_t)(m->committed + m->staged - m->summed), width = (size_t)m->width;
    size_t features = (size_t)m->form->features;
    size_t floats = rows * features + features + 2 * (width + 1) + 2 * rows;
    if (m->form->fades) floats += (size_t)(m->staged + 1) * width * width;
    return floats * sizeof(float);
}
/* floats of the partial sums of one kv head and chunk */
static inline size_t ls_partial_floats(const ls_mixer *m) {
    return ls_query_count(m) * (size_t)(m->width + 2);
}
/* most rows that a node sees exactly, but for sinks */
static inline int64_t ls_row_count(const ls_mixer *m) {
    int64_t most = (int64_t)m->committed + m->staged;
    if (m->window && m->window < most) most = m->window;
    if (m->group && m->group * m->span < most) most = m->group * m->span;
    return most;
}
/* chunks that they may fill */
static inline int ls_chunk_count(const ls_mixer *m) {
    return (int)((ls_row_count(m) + LS_CHUNK - 1) / LS_CHUNK);
}

/* The end of a tile: y [rows][stride] = sums * scale of row * scale of channel + bias,
 * plus what is in y if `add`. Null pointers stand for ones and zeros. */
typedef struct {
    const float *row_scales, *channel_scales, *bias;
    int64_t stride;
    int width, add; /* width: channels that exist, at most 32 */
} ls_epilogue;

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
    /* pack row x into a block of `rows` rows: every `rows`-th four codes (or float) from `codes` on;
     * returns its scale. offsets: what unsigned weights add too much, negated, for every group or
     * (per_group = 0) for the row */
    float (*quantize_row)(const float *x, int width, int padded, int rows, int per_group,
                          int8_t *codes, int32_t *offsets);
    void (*copy_row)(const float *x, int width, int rows, float *to);
    /* see ls_epilogue */
    void (*epilogue)(const ls_epilogue *to, int rows, const float *sums, float *y);
    /* y = x * weight / sqrt(mean(x^2) + eps) */
    void (*rms_norm)(const float *x, const float *weight, float eps, int width, float *y);
    /* y = (x - mean(x)) * weight / sqrt(variance(x) + eps) + bias, which may be null */
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float eps, int width,
                       float *y);
    /* y = f(gate) * up, or f(gate) where up is null; f is LS_SILU, .. */
    void (*activate)(int f, const float *gate, const float *up, int width, float *y);
    /* x = cap tanh(x / cap) in place */
    void (*cap)(float *x, float cap, int width);
    /* x / |x| in place */
    void (*normalize)(float *x, int width);
    /* The queries of kv head `head` over the rows of a chunk; q [nodes][stride], heads side by side.
     * partial: a sum [width] for every node and query head of the kv head, then for each of these the
     * state of its softmax, two floats. scratch: ls_attend_scratch_bytes(m). */
    void (*attend_chunk)(const ls_mixer *m, int head, int chunk, const float *q, int64_t q_stride,
                         float *partial, void *scratch);
    /* the partial sums of all chunks put together, plus sums and convolution: out as q */
    void (*combine)(const ls_mixer *m, int head, int chunks, const float *q, int64_t q_stride,
                    float *partials, float *out, int64_t out_stride, void *scratch);
    /* x becomes its features in place: LS_MAP_.., of those that need no more than the row */
    void (*map)(int map, float *x, int width);
    /* what stands behind a key, from the key ahead of its rotation */
    void (*gates)(const ls_mixer *m, const float *k, float *gates);
    /* all that the nodes of one kv head read where `form` is given; m->kv_heads is 1 */
    void (*read_summed)(const ls_mixer *m, const float *q, int64_t q_stride, float *out, int64_t out_stride,
                        void *scratch);
    /* sums after the rows first .. last - 1 have closed; scratch: their features, one row */
    void (*fold_summed)(const ls_mixer *m, int first, int last, float *sums, void *scratch);
    /* sums [width][width] += keys^T values of the rows first .. last - 1 of a kv head, which close */
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
size_t ls_packed_bytes(const ls_linear *layer, int rows);
ls_packed_rows ls_packed_at(const ls_linear *layer, int rows, void *memory);
void ls_pack_rows(const ls_linear *layer, const ls_packed_rows *to, int first, int last, const float *x,
                  int64_t stride);
void ls_multiply_tiles(const ls_linear *layer, const ls_packed_rows *x, int first, int last, float *y,
              int64_t stride, int add);
static inline int ls_tile_count(const ls_linear *layer) {
    return (layer->outputs + LS_TILE - 1) / LS_TILE;
}
/* the share of `count` that belongs to `thread` */
static inline int ls_share(int count, int thread, int threads) {
    return (int)((int64_t)count * thread / threads);
}

#endif
