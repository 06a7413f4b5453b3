/* Linear layers: rows are packed once, then every thread multiplies its share of the tiles. */
#include "kernels.h"

#define PIECE_BYTES (48 * 1024) /* of weights that a thread takes at once */
#define CHUNK_BYTES (256 * 1024) /* of packed rows that one pass over the weights serves */

static int is_integer(const ls_linear *layer) { return layer->kind >= LS_INT8; }

static size_t row_bytes(const ls_linear *layer) {
    return is_integer(layer) ? (size_t)layer->padded : (size_t)layer->inputs * sizeof(float);
}

static size_t row_scales(const ls_linear *layer) {
    return layer->kind == LS_BLOCKS ? (size_t)layer->padded / LS_GROUP * LS_BLOCK_SCALES : 1;
}

static size_t row_offsets(const ls_linear *layer) {
    if (layer->kind == LS_BLOCKS) return (size_t)layer->padded / LS_GROUP * LS_BLOCK_SUMS;
    return layer->kind == LS_INT4 ? (size_t)layer->padded / LS_GROUP : 1;
}

/* Memory that `rows` packed rows need. */
size_t ls_packed_bytes(const ls_linear *layer, int rows) {
    return ls_up64(rows * row_bytes(layer)) + ls_up64(rows * row_offsets(layer) * sizeof(int32_t)) +
           ls_up64(rows * row_scales(layer) * sizeof(float));
}

/* `memory` cut into the parts of packed rows. */
ls_packed_rows ls_packed_at(const ls_linear *layer, int rows, void *memory) {
    char *at = memory;
    ls_packed_rows x = {rows, at, NULL, NULL};
    at += ls_up64(rows * row_bytes(layer));
    x.offsets = (int32_t *)at;
    at += ls_up64(rows * row_offsets(layer) * sizeof(int32_t));
    x.scales = (float *)at;
    return x;
}

static int block_size(int rows, int row) {
    int left = rows - row / LS_ROWS * LS_ROWS;
    return left < LS_ROWS ? left : LS_ROWS;
}

/* Pack rows first..last-1 of x [rows][stride]. */
void ls_pack_rows(const ls_linear *layer, const ls_packed_rows *to, int first, int last, const float *x,
                  int64_t stride) {
    const ls_ops *ops = ls_current();
    int groups = layer->padded / LS_GROUP, per_group = layer->kind == LS_INT4;
    for (int row = first; row < last; row++) {
        int size = block_size(to->rows, row), begin = row / LS_ROWS * LS_ROWS, index = row - begin;
        const float *from = x + row * stride;
        if (!is_integer(layer)) {
            float *at = (float *)to->codes + (size_t)begin * layer->inputs + index;
            ops->copy_row(from, layer->inputs, size, at);
            continue;
        }
        int8_t *codes = (int8_t *)to->codes + (size_t)begin * layer->padded + 4 * index;
        if (layer->kind == LS_BLOCKS) {
            ops->quantize_blocks(from, groups, size, codes, to->offsets + begin * row_offsets(layer) + index,
                                 to->scales + begin * row_scales(layer) + index);
            continue;
        }
        int32_t *offsets = to->offsets + (per_group ? (size_t)begin * groups : (size_t)begin) + index;
        to->scales[row] =
            ops->quantize_row(from, layer->inputs, layer->padded, size, per_group, codes, offsets);
    }
}

/* The part that a tile of a layer of blocks belongs to, and its first channel; the tile becomes one of
 * the part's. */
static const ls_linear_part *part_of(const ls_linear *layer, int *tile, int *channel) {
    const ls_linear_part *part = layer->part;
    for (*channel = 0;; *channel += part++->outputs) {
        int tiles = (part->outputs + LS_TILE - 1) / LS_TILE;
        if (*tile < tiles) return part;
        *tile -= tiles;
    }
}

static void sum_blocks(const ls_linear *layer, const ls_linear_part *part, const ls_packed_rows *x, int tile,
                       int first, int rows, float *sums) {
    ls_block_rows from = {(const int8_t *)x->codes + (size_t)first * layer->padded,
                          x->offsets + first * row_offsets(layer),
                          x->scales + first * row_scales(layer)};
    size_t at = (size_t)tile * ls_block_tile_bytes(part->format, layer->padded);
    ls_current()->blocks(part->format, (const uint8_t *)part->weights + at, &from,
                         layer->padded / LS_GROUP, rows, sums);
}

/* Sums of one tile over a block of rows: [rows][32]. */
static void sum_tile(const ls_linear *layer, const ls_packed_rows *x, int tile, int first, int rows,
                     float *sums) {
    const ls_ops *ops = ls_current();
    const char *w = layer->weights;
    int padded = layer->padded, inputs = layer->inputs, groups = padded / LS_GROUP;
    const int8_t *codes = (const int8_t *)x->codes + (size_t)first * padded;
    const float *floats = (const float *)x->codes + (size_t)first * inputs;
    size_t weights = (size_t)tile * LS_TILE * (size_t)(is_integer(layer) ? padded : inputs);
    switch (layer->kind) {
        case LS_INT8:
            ops->int8((const uint8_t *)w + weights, codes, x->offsets + first, padded / 4, rows,
                      sums);
            break;
        case LS_INT4:
            ops->int4((const uint8_t *)w + (size_t)tile * groups * LS_INT4_BYTES, codes,
                      x->offsets + (size_t)first * groups, groups, rows, sums);
            break;
        case LS_F32: ops->f32((const float *)w + weights, floats, inputs, rows, sums); break;
        default: ops->bf16((const uint16_t *)w + weights, floats, inputs, rows, sums);
    }
}

static void one_tile(const ls_linear *layer, const ls_packed_rows *x, int tile, int first, int rows,
                     float *y, int64_t stride, int add) {
    float sums[LS_ROWS * LS_TILE];
    int channel = 0, outputs = layer->outputs, blocks = layer->kind == LS_BLOCKS;
    if (blocks) {
        const ls_linear_part *part = part_of(layer, &tile, &channel);
        sum_blocks(layer, part, x, tile, first, rows, sums);
        outputs = part->outputs;
    } else {
        sum_tile(layer, x, tile, first, rows, sums);
    }
    int width = outputs - tile * LS_TILE;
    channel += tile * LS_TILE;
    ls_epilogue to = {
        .row_scales = is_integer(layer) && !blocks ? x->scales + first : NULL,
        .channel_scales = layer->scales ? layer->scales + channel : NULL,
        .bias = layer->bias ? layer->bias + channel : NULL,
        .stride = stride,
        .width = width < LS_TILE ? width : LS_TILE,
        .add = add,
    };
    ls_current()->epilogue(&to, rows, sums, y + first * stride + channel);
}

/* y [rows][stride] = (or += if `add`) tiles first..last-1 of the layer, for all packed rows. */
void ls_multiply_tiles(const ls_linear *layer, const ls_packed_rows *x, int first, int last, float *y,
              int64_t stride, int add) {
    int chunk = (int)(CHUNK_BYTES / row_bytes(layer)) / LS_ROWS * LS_ROWS;
    if (chunk < 2 * LS_ROWS) chunk = 2 * LS_ROWS;
    for (int begin = 0; begin < x->rows; begin += chunk) {
        int end = begin + chunk < x->rows ? begin + chunk : x->rows;
        for (int tile = first; tile < last; tile++)
            for (int row = begin; row < end; row += LS_ROWS) {
                int rows = end - row < LS_ROWS ? end - row : LS_ROWS;
                one_tile(layer, x, tile, row, rows, y, stride, add);
            }
    }
}

static size_t tile_bytes(const ls_linear *layer) {
    if (layer->kind == LS_INT4) return (size_t)layer->padded / LS_GROUP * LS_INT4_BYTES;
    size_t size = layer->kind == LS_F32 ? 4 : layer->kind == LS_BF16 ? 2 : 1;
    return size * LS_TILE * (size_t)(is_integer(layer) ? layer->padded : layer->inputs);
}

/* Many rows take long for a tile, and want several while they are in the cache. */
int ls_piece_tiles(const ls_linear *layer, int rows) {
    return 1 + (int)(PIECE_BYTES * (1 + (size_t)rows / 64) / tile_bytes(layer));
}

void ls_multiply_shared(const ls_linear *layer, const ls_packed_rows *x, float *y, int64_t stride, int add,
                        int thread, int threads) {
    int most = ls_piece_tiles(layer, x->rows);
    for (ls_pieces p = ls_pieces_of(ls_tile_count(layer), most, thread, threads); ls_take(&p);)
        ls_multiply_tiles(layer, x, p.first, p.last, y, stride, add);
}

/* ---- one layer alone */

typedef struct {
    const ls_linear *layer;
    const float *x;
    float *y;
    int64_t x_stride, y_stride;
    ls_packed_rows rows;
} call;

static void linear_body(void *context, int thread, int threads) {
    call *c = context;
    int rows = c->rows.rows;
    ls_pack_rows(c->layer, &c->rows, ls_share(rows, thread, threads),
                 ls_share(rows, thread + 1, threads), c->x, c->x_stride);
    ls_barrier(threads);
    ls_multiply_shared(c->layer, &c->rows, c->y, c->y_stride, 0, thread, threads);
}

/* Bytes of workspace that `ls_linear_forward` needs for this many rows. */
LS_API int64_t ls_linear_workspace(const ls_linear *layer, int32_t rows) {
    return (int64_t)ls_packed_bytes(layer, rows);
}

/* y [rows][y_stride] = x [rows][x_stride] W^T + bias. */
LS_API void ls_linear_forward(const ls_linear *layer, const float *x, int64_t x_stride,
                              int32_t rows, float *y, int64_t y_stride, void *workspace,
                              int32_t threads) {
    call c = {layer, x, y, x_stride, y_stride, ls_packed_at(layer, rows, workspace)};
    ls_parallel(linear_body, &c, threads, LS_SPIN_LAYER);
}
