/* Interface of linspec's CPU kernels, and what their files share.
 *
 * Words: a *tile* is 32 neighbouring output channels, whose weights lie interleaved so that one
 * vector register holds several channels. A *block* is 1..8 input rows that are
 * multiplied by a tile at once. Rows are independent: what is computed for one row, and in which order,
 * does not depend on how many rows there are. That makes speculation lossless bit for bit.
 */
#ifndef LINSPEC_KERNELS_H
#define LINSPEC_KERNELS_H

#include "blocks.h"

#define LS_API __attribute__((visibility("default")))
#define LS_ROWS 8    /* most rows of a block */
#define LS_INT4_BYTES 576 /* of one group of one tile: 32 scales, 512 packed bytes */
#define LS_BLOCK LS_PAGE /* rows whose sums are made together */
#define LS_QUERY_FLOATS 35 /* of scratch for a query and the rows that its node sees, see attention.inc.h */
#define LS_CHUNK 1024 /* rows whose blocks are put together before the next ones, see merge.inc.h */
#define LS_READINGS 4 /* most queries that read the same rows of sums together */
#define LS_REBUILT 4096 /* rows of closed segments whose keys are rebuilt together */
#define LS_CHUNK_BLOCKS (LS_CHUNK / LS_BLOCK)

/* Input rows in the order in which tiles read them. codes: for each block [padded / 4][rows of block][4] (int8) or
 * [inputs][rows of block] floats. offsets: what the unsigned weights add too much, negated; for each
 * block [rows] (int8) or [padded / 32][rows] (int4). scales [rows]. For weights in blocks offsets and scales
 * are the sums and scales of ls_block_rows. */
typedef struct {
    int32_t rows;
    void *codes;
    int32_t *offsets;
    float *scales;
} ls_packed_rows;

/* A block of rows for weights in blocks; codes as above. sums [groups][LS_BLOCK_SUMS][rows] and scales
 * [groups][LS_BLOCK_SCALES][rows] are what blocks.h says. */
typedef struct {
    const int8_t *codes;
    const int32_t *sums;
    const float *scales;
} ls_block_rows;

/* One mixer over the rows of one slot; see attention.inc.h. The rest is as in ls_layer. */
typedef struct {
    int32_t heads, kv_heads, width;   /* width of a head */
    int32_t committed;                /* committed rows, which every node sees */
    int32_t staged, nodes;            /* staged rows after this step; new nodes, the last of them */
    int32_t summed;                   /* first rows that the sums hold already */
    int64_t window, group, span, far_group, far_span;
    int32_t rebuilt;
    float threshold;
    int32_t squared_relu;
    float score_factor;               /* on q.k ahead of a softmax, beside 1 / sqrt(width) */
    float score_scale, score_cap;     /* both together; a cap of 0 is none */
    int32_t taps;                     /* the values of the rows before the first lie before `values` */
    float alpha;
    const float *conv_weights;        /* [heads][taps] */
    const float *bias;                /* [heads][bias_distances], null without */
    int32_t bias_distances;
    int32_t row_kind, row_bytes;      /* LS_F32, LS_BF16, LS_F16, LS_INT8 or LS_INT4; of a row */
    int64_t key_stride, value_stride; /* bytes from one kv head to the next */
    const char *keys, *values;        /* [kv_heads][rows][row_bytes]; of pages one kv head, without the first rows: */
    int32_t paged;                    /* rows that are in pages, ahead of those in keys and values */
    const char *const *pages;         /* [paged / LS_PAGE] */
    int64_t page_keys, page_values;   /* bytes from the beginning of a page to its rows */
    const float *sums;                /* [kv_heads][width][width], null without */
    const ls_summed *form;            /* null: attention. The rest is then null, or of its kv head: */
    const float *query_map, *key_map, *query_factors, *gate_map, *gate_scale, *gate_bias;
    int32_t value_bytes;              /* of a row of values */
    int32_t sinks;                    /* first rows of the text, which every node sees */
    const char *sink_rows;            /* keys [sinks][row_bytes], then values; null while they are rows */
    const uint64_t *ancestors;        /* [staged]: bit i says that staged row i is seen; null: nothing is staged */
    const int32_t *overwritten;       /* [nodes]: the rows of nodes that overwrite, around which taps lie; null: others */
    int32_t ahead, behind;            /* rows of their slot ahead of the first one here, and behind the committed ones */
    int32_t chosen, coded;            /* groups ahead of the span that a node reads, judged by codes or by bounds: */
    uint16_t *judge;                  /* of all pages, see select.inc.h */
    int32_t budget, asked, pool;      /* rows that stay of closed groups, see evicting.inc.h: */
    const float *kept;                /* [budget][2 * width + 1] */
    const float *kept_next;           /* once the rows before next_summed are among them, where that is known; or null */
    int32_t next_summed;
    int32_t positions, selects;
    int32_t *lists;                   /* [nodes], of what each selected, see positions.inc.h; list_stride: to the next one */
    int64_t list_stride;
    int32_t rank, chunk, outliers, marked; /* of closed segments, see shadow.inc.h; chunk 0: there are none */
    int32_t past_heads, past_head;    /* of how many kv heads these are, and which one */
    int32_t left_bytes;               /* of a row of their left factors */
    const ls_past *past;              /* [2]: those now, and those that a node sees whose first row is not the first */
    int32_t turned;                   /* features that rebuilt keys are turned in; 0: none */
    const float *cosines, *sines;     /* [positions][turned] */
} ls_mixer;

static inline size_t ls_query_count(const ls_mixer *m) {
    return (size_t)m->nodes * (size_t)(m->heads / m->kv_heads);
}
/* features, rounded up to whole vectors of sixteen */
static inline int ls_up16(int n) { return (n + 15) & ~15; }
/* floats of the keys and values of a block of rows */
static inline size_t ls_block_floats(const ls_mixer *m) { return (size_t)(2 * LS_BLOCK * ls_up16(m->width)); }
/* two blocks of rows; where keys are rebuilt the keys of two more, and one */
static inline size_t ls_read_floats(const ls_mixer *m) {
    return m->rebuilt ? 3 * ls_block_floats(m) + (size_t)ls_up16(m->width) : 2 * ls_block_floats(m);
}
/* these, then for each query its features, once more by features, and itself */
static inline size_t ls_attend_scratch_bytes(const ls_mixer *m) {
    size_t query = 2 * (size_t)ls_up16(m->width) + LS_QUERY_FLOATS;
    return 64 + sizeof(float) * (ls_read_floats(m) + ls_query_count(m) * query);
}
/* numbers of what judges a page by codes, or LS_JUDGED pages by bounds */
static inline int64_t ls_judge_numbers(const ls_mixer *m) {
    return m->coded ? ls_up16(m->width) * (2 + LS_PAGE / 8) : 2 * m->width * LS_JUDGED;
}
/* where nodes select groups: the same, queries that see a block, plain queries, what each node has of a group, numbers of
 * groups, and who sees each */
static inline size_t ls_select_scratch_bytes(const ls_mixer *m) {
    size_t groups = (size_t)((m->committed + m->staged) / m->group + 1);
    size_t queries = (LS_QUERY_FLOATS + (size_t)ls_up16(m->width)) * ls_query_count(m);
    size_t floats = queries + groups * (size_t)m->nodes + (size_t)m->chosen;
    return ls_attend_scratch_bytes(m) + 3 * 64 + sizeof(float) * floats + sizeof(uint64_t) * groups;
}
/* where nodes select positions: queries, and what rows count for each node; where they read them: and gathered rows */
static inline size_t ls_positions_scratch_bytes(const ls_mixer *m) {
    size_t rows = (size_t)(m->committed + m->staged), block = 2 * LS_BLOCK * (size_t)m->row_bytes;
    size_t judged = m->selects ? sizeof(float) * rows * (size_t)m->nodes : 0;
    return ls_attend_scratch_bytes(m) + (judged > block ? judged : block);
}
/* chunks of closed segments, at most */
static inline int ls_past_chunks(const ls_mixer *m) {
    int segments = m->past[0].segments > m->past[1].segments ? m->past[0].segments : m->past[1].segments;
    return segments * (int)(m->group / m->chunk);
}
/* chunks whose keys are rebuilt together: those of a few segments, or of one */
static inline int ls_rebuilt_chunks(const ls_mixer *m) {
    int segments = m->group < LS_REBUILT ? LS_REBUILT / (int)m->group : 1;
    return segments * (int)(m->group / m->chunk);
}
/* where nodes read closed segments: queries, scores of landmarks, rebuilt keys, factors, a block of rows, places of chunks, and
 * which of them each node selects */
static inline size_t ls_shadow_scratch_bytes(const ls_mixer *m) {
    size_t padded = (size_t)ls_up16(m->width), chunks = (size_t)ls_past_chunks(m), rank = (size_t)m->rank;
    size_t selected = (size_t)m->marked < chunks ? (size_t)m->marked : chunks;
    size_t floats = ls_query_count(m) * (size_t)ls_up16((int)chunks) + chunks + (size_t)m->nodes * selected;
    floats += (size_t)ls_rebuilt_chunks(m) * (size_t)m->chunk * padded;
    floats += rank * padded + LS_BLOCK * (size_t)ls_up16(m->rank) + LS_BLOCK * padded;
    return ls_attend_scratch_bytes(m) + sizeof(float) * floats + LS_BLOCK * (size_t)m->value_bytes;
}
/* whether nodes read the rows of lists */
static inline int ls_reads_lists(const ls_mixer *m) { return m->positions && !m->selects; }
/* whether they read these, selected groups, closed segments, or sums: not block by block */
static inline int ls_reads_whole(const ls_mixer *m) { return m->form || m->chosen || m->chunk || ls_reads_lists(m); }
/* of groups that become rows: these, what they were made of, weights and places of all rows; or a block of rows */
static inline size_t ls_compressed_scratch_bytes(const ls_mixer *m) {
    size_t rows = (size_t)(m->committed + m->staged - m->summed), made = (size_t)m->form->kept_rows;
    size_t closed = rows / (size_t)m->group + 1, all = rows + (closed + (size_t)m->form->kept_groups) * made;
    size_t floats = closed * made * (2 * (size_t)m->width + 1) + closed * (size_t)m->group + 2 * all;
    if (m->taps && floats < ls_block_floats(m)) floats = ls_block_floats(m);
    return floats * sizeof(float);
}
static inline size_t ls_summed_scratch_bytes(const ls_mixer *m) {
    size_t rows = (size_t)(m->committed + m->staged - m->summed), width = (size_t)m->width;
    size_t features = (size_t)m->form->features;
    if (m->form->kept_groups) return ls_compressed_scratch_bytes(m);
    size_t floats = rows * features + LS_READINGS * (features + 2 * (width + 1) + rows) + rows;
    if (m->form->fades) floats += (size_t)(m->staged + 1) * width * width;
    /* the convolution comes last and takes a block of rows */
    if (m->taps && floats < ls_block_floats(m)) floats = ls_block_floats(m);
    return floats * sizeof(float);
}
/* floats of the partial sums of one kv head, over whichever rows */
static inline size_t ls_partial_floats(const ls_mixer *m) {
    return ls_query_count(m) * (size_t)(ls_up16(m->width) + 2);
}
/* blocks that the exact rows of a node may fill, but for sinks, of `rows` that there are; 0 is no window or group */
static inline int ls_blocks_within(int64_t rows, int64_t window, int64_t group, int64_t span) {
    if (window && window < rows) rows = window;
    if (group && group * span < rows) rows = group * span;
    return (int)((rows + LS_BLOCK - 1) / LS_BLOCK);
}
/* blocks of rows that are kept, ahead of those */
static inline int ls_kept_blocks(int budget) { return (budget + LS_BLOCK - 1) / LS_BLOCK; }
static inline int ls_block_count(const ls_mixer *m) {
    int near = ls_blocks_within((int64_t)m->committed + m->staged, m->window, m->group, m->span);
    return ls_kept_blocks(m->budget) + near;
}
/* groups that may close on the path to a node, of rows that are not among the kept ones */
static inline int ls_closing_groups(int64_t rows, int64_t group, int64_t span) {
    int64_t closing = (rows - 1) / group - (span - 1);
    return closing > 0 ? (int)closing : 0;
}
static inline size_t ls_kept_floats(const ls_mixer *m) { return (size_t)m->budget * (size_t)(2 * m->width + 1); }
/* floats of scratch for a group that closes */
static inline size_t ls_close_floats(const ls_mixer *m) {
    size_t rows = (size_t)m->budget + (size_t)m->group, padded = (size_t)ls_up16(m->width);
    return rows * (padded + 34) + 16 * (padded + 4) + (size_t)m->group;
}
/* Groups that close on the paths to nodes: which rows they are of [closing][group], at first -1, what is kept once each has
 * closed, and ls_close_floats. */
typedef struct {
    int32_t *paths;
    float *kept, *scratch;
} ls_closings;
static inline int ls_chunk_count(int blocks) { return (blocks + LS_CHUNK_BLOCKS - 1) / LS_CHUNK_BLOCKS; }

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
    void (*blocks)(int format, const uint8_t *w, const ls_block_rows *x, int groups, int rows,
                   float *out);
    /* pack row x into a block of `rows` rows: every `rows`-th four codes (or float) from `codes` on;
     * returns its scale. offsets: what unsigned weights add too much, negated, for every group or
     * (per_group = 0) for the row */
    float (*quantize_row)(const float *x, int width, int padded, int rows, int per_group,
                          int8_t *codes, int32_t *offsets);
    /* the same for weights in blocks: codes, sums and scales of whole groups, see ls_block_rows */
    void (*quantize_blocks)(const float *x, int groups, int rows, int8_t *codes, int32_t *sums,
                            float *scales);
    void (*copy_row)(const float *x, int width, int rows, float *to);
    /* x as 16-bit floats, LS_BF16 or LS_F16 */
    void (*narrow_row)(const float *x, int width, int kind, uint16_t *to);
    /* x as a row of 4-bit codes, see nibbles.inc.h */
    void (*pack_nibbles)(const float *x, int width, uint8_t *to);
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
    /* The queries of kv head `head` over `count` blocks of their rows from `first` on, all in one chunk; q
     * [nodes][stride], heads side by side. partial: their partial sums (merge.inc.h), if `apart` those of each
     * block, else of all, which are then the first of their chunk. scratch: ls_attend_scratch_bytes(m). */
    void (*attend)(const ls_mixer *m, int head, int first, int count, int apart, const float *q, int64_t q_stride,
                   float *partial, void *scratch);
    /* Put the partial sums of later rows behind those of rows before them. */
    void (*merge)(const ls_mixer *m, float *partial, float *more);
    /* As `attend` over all that the nodes of the one kv head of m select, and over their span; `more` is for further
     * partial sums. scratch: ls_select_scratch_bytes(m) */
    void (*attend_selected)(const ls_mixer *m, const float *q, int64_t q_stride, float *partial, float *more,
                            void *scratch);
    /* What the nodes of the one kv head of m select for later layers, in its lists; as `attend` over the rows of such lists
     * and over their span. scratch: ls_positions_scratch_bytes(m) */
    void (*select_positions)(const ls_mixer *m, const float *q, int64_t q_stride, void *scratch);
    void (*attend_listed)(const ls_mixer *m, const float *q, int64_t q_stride, float *partial, void *scratch);
    /* as `attend` over what the nodes of the one kv head of m read of closed segments, and over their span; scratch:
     * ls_shadow_scratch_bytes(m) */
    void (*attend_shadow)(const ls_mixer *m, const float *q, int64_t q_stride, float *partial, void *scratch);
    /* what judges the pages first .. last - 1 of the one kv head of m, from its rows: bounds, or codes */
    void (*bound_pages)(const ls_mixer *m, int first, int last);
    void (*code_pages)(const ls_mixer *m, int first, int last);
    /* rows kept, in place, once the groups of the rows first .. last - 1 of the one kv head of m have closed; scratch:
     * ls_close_floats(m) */
    void (*close_groups)(const ls_mixer *m, int first, int last, float *kept, float *scratch);
    /* the rows kept for a node, once the groups have closed that close on its path; last: behind the nodes next to it
     * that close the same ones */
    const float *(*close_on_path)(const ls_mixer *m, int node, int *last, ls_closings *c);
    /* from the partial sums of all rows, plus sums and convolution: out as q */
    void (*end_attention)(const ls_mixer *m, int head, const float *q, int64_t q_stride, float *partial, float *out,
                          int64_t out_stride, void *scratch);
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
/* Behind a barrier (or at the beginning of a body), by all threads: whether this one goes on, and with how many. A
 * thread less goes on where others had to wait for one that had no core. */
int ls_goes_on(int thread, int *threads);
/* The items 0 .. count - 1 in pieces of `most` at most, each for whichever thread takes it first; which one does
 * changes no result. Between two barriers, on all threads, one set of pieces:
 *     for (ls_pieces p = ls_pieces_of(count, most, thread, threads); ls_take(&p);) p.first .. p.last - 1
 * A thread takes its own share in order, then what is left of others'. Shares are even, or begin at `begins`
 * [threads + 1], whose last number is the count. */
typedef struct {
    const int32_t *begins;
    int count, most, thread, threads;
    int others, first, last; /* whose share is taken now, counted from the thread's own; the piece */
} ls_pieces;
static inline ls_pieces ls_pieces_of(int count, int most, int thread, int threads) {
    return (ls_pieces){.count = count, .most = most, .thread = thread, .threads = threads};
}
static inline ls_pieces ls_pieces_from(const int32_t *begins, int most, int thread, int threads) {
    ls_pieces p = ls_pieces_of(begins[threads], most, thread, threads);
    p.begins = begins;
    return p;
}
int ls_take(ls_pieces *p);
void *ls_scratch(size_t bytes); /* aligned memory of the calling thread, valid until its next call */

/* Rotary positions: halves are paired as in Llama checkpoints; the sign of the halves is part of `sines`. */
static inline void ls_turn(float *x, const float *cosines, const float *sines, int width) {
    int half = width / 2;
    for (int i = 0; i < half; i++) {
        float low = x[i], high = x[i + half];
        x[i] = low * cosines[i] + high * sines[i];
        x[i + half] = high * cosines[i + half] + low * sines[i + half];
    }
}

/* bytes or floats, rounded up to what the parts of a workspace begin at */
static inline size_t ls_up64(size_t n) { return (n + 63) & ~(size_t)63; }

/* heads.c: indices of the `top` largest of x, largest first, lower ones first among equals */
void ls_top_k(const float *x, int count, int top, int32_t *to);
/* positions.c: indices of the `most` greatest of x, of equal ones the first, in ascending order; returns how many */
int32_t ls_greatest(const float *x, int count, int most, int32_t *to);
/* blocks.c: the weights of one channel as floats */
void ls_block_row(const ls_linear_part *part, int inputs, int channel, float *to);

/* linear.c */
size_t ls_packed_bytes(const ls_linear *layer, int rows);
ls_packed_rows ls_packed_at(const ls_linear *layer, int rows, void *memory);
void ls_pack_rows(const ls_linear *layer, const ls_packed_rows *to, int first, int last, const float *x,
                  int64_t stride);
void ls_multiply_tiles(const ls_linear *layer, const ls_packed_rows *x, int first, int last, float *y,
              int64_t stride, int add);
/* all tiles, shared out among the threads; between two barriers */
void ls_multiply_shared(const ls_linear *layer, const ls_packed_rows *x, float *y, int64_t stride, int add,
                        int thread, int threads);
int ls_piece_tiles(const ls_linear *layer, int rows); /* tiles of a piece */
static inline int ls_tile_count(const ls_linear *layer) {
    int tiles = 0;
    if (layer->kind != LS_BLOCKS) return (layer->outputs + LS_TILE - 1) / LS_TILE;
    for (int i = 0; i < layer->parts; i++) tiles += (layer->part[i].outputs + LS_TILE - 1) / LS_TILE;
    return tiles;
}
/* the share of `count` that belongs to `thread` */
static inline int ls_share(int count, int thread, int threads) {
    return (int)((int64_t)count * thread / threads);
}

#endif
