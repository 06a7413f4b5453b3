/* Weighted sums of rows of floats: the end of all that a mixer does. Part of every isa_*.c. */

/* Row i is at `rows + indices[i] * stride` (in floats), or the i-th without indices. ahead: floats to the row
 * that is prefetched meanwhile, if any. */
typedef struct {
    const float *rows;
    const int32_t *indices;
    int64_t stride;
    int count, width;
    int64_t ahead;
} source;

/* out = out * keep + sum of weights[i] * row i */
typedef struct {
    float *out;
    const float *weights;
    float keep;
} accumulator;

#define MAX_ACCUMULATORS 4
/* vectors of a row that `count` accumulators take at once: as many sums as the registers can hold, and enough to
 * hide the time of an addition */
#define COLUMNS(count) ((count) == 1 ? 8 : (count) == 4 && LS_LANES == 8 ? 2 : 4)

/* `parts` vectors from `column` on; the last of them has n floats */
INLINE void accumulate_columns(const source *s, const accumulator *to, int count, int column, int parts, int n) {
    vl sums[MAX_ACCUMULATORS][8];
    UNROLL(count, t)
        UNROLL(parts, c) {
            const float *at = to[t].out + column + LS_LANES * c;
            sums[t][c] = (n < LS_LANES ? vl_load_part(at, n) : vl_load(at)) * vl_set1(to[t].keep);
        }
    for (int i = 0; i < s->count; i++) {
        const float *row = s->rows + (s->indices ? s->indices[i] : i) * s->stride + column;
        if (s->ahead)
            for (int c = 0; c < parts * LS_LANES; c += 16) __builtin_prefetch(row + s->ahead + c);
        vl weights[MAX_ACCUMULATORS];
        UNROLL(count, t) weights[t] = vl_set1(to[t].weights[i]);
        UNROLL(parts, c) {
            const float *at = row + LS_LANES * c;
            vl value = n < LS_LANES ? vl_load_part(at, n) : vl_load(at);
            UNROLL(count, t) sums[t][c] = LS_LANES_FMA(weights[t], value, sums[t][c]);
        }
    }
    UNROLL(count, t)
        UNROLL(parts, c) {
            float *at = to[t].out + column + LS_LANES * c;
            if (n < LS_LANES)
                vl_store_part(at, sums[t][c], n);
            else
                vl_store(at, sums[t][c]);
        }
}

INLINE void accumulate_rows(const source *s, const accumulator *to, int count) {
    int c = 0, wide = COLUMNS(count) * LS_LANES;
    for (; c + wide <= s->width; c += wide) accumulate_columns(s, to, count, c, COLUMNS(count), LS_LANES);
    for (; c + 4 * LS_LANES <= s->width; c += 4 * LS_LANES) accumulate_columns(s, to, count, c, 4, LS_LANES);
    for (; c + LS_LANES <= s->width; c += LS_LANES) accumulate_columns(s, to, count, c, 1, LS_LANES);
    if (c < s->width) accumulate_columns(s, to, count, c, 1, s->width - c);
}

/* how many of `count` come next, so that no one is left over where two could share a load */
INLINE int next_of(int count) {
    if (count <= LS_QUERIES) return count;
    return count == LS_QUERIES + 1 ? (count + 1) / 2 : LS_QUERIES;
}

/* any number of accumulators over the same rows; constants, so that the sums stay in registers */
static void accumulate(const source *s, const accumulator *to, int count) {
    for (int n; count > 0; to += n, count -= n) {
        n = next_of(count);
        switch (n) {
            case 1: accumulate_rows(s, to, 1); break;
            case 2: accumulate_rows(s, to, 2); break;
            case 3: accumulate_rows(s, to, 3); break;
#if LS_QUERIES > 3
            case 4: accumulate_rows(s, to, 4); break;
#endif
        }
    }
}
