/* The line of work that attention over rows is, see lean.c. */
#ifndef LINSPEC_LEAN_H
#define LINSPEC_LEAN_H

#include "kernels.h"

/* Neighbouring blocks of one item, within a chunk: what a thread takes at once. at: floats from the beginning of all
 * partial sums to its own. */
typedef struct {
    int32_t item, first, count;
    int64_t at;
} ls_piece;

/* How much room the line of a step needs, whichever layer it is of, and its pieces. floats: of the partial sums of
 * chunks; all_floats: with those of blocks apart behind them. whole: it is cut between chunks only, as partial sums are
 * large. */
typedef struct {
    int32_t items, threads, pieces, whole;
    size_t floats, all_floats;
    int32_t *blocks, *first_piece, *begins; /* [items], [items + 1]; the first piece of each share [threads + 1] */
    ls_piece *piece;
} ls_line;

/* Cut a line of items of so many blocks each into pieces, in order, and these into shares: shares differ by a
 * block, but if it is cut between chunks only (`whole`). Returns how many pieces there are: chunks + threads - 1 at
 * most. An item has a block at least. */
LS_API int32_t ls_cut_line(const int32_t *blocks, int32_t items, int32_t threads, int32_t whole, ls_piece *pieces,
                           int32_t *begins);

ls_line ls_line_of(const ls_decoder *d, const ls_batch *b, int threads);
/* bytes of workspace beside partial sums, and where they are */
size_t ls_line_bytes(const ls_line *line);
void ls_place_line(ls_line *line, void *memory);

/* All that the nodes of one kv head read, on this thread. */
void ls_attend_whole(const ls_mixer *m, const float *q, int64_t q_stride, float *out, int64_t out_stride);

#endif
