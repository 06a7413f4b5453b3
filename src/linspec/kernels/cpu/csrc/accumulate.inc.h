/* Weighted sums of rows: the end of all that a mixer does. Part of every isa_*.c. */

/* Row i is at `rows + indices[i] * stride`, or the i-th without indices; kind: of its features. Rows of other kinds
 * than LS_F32 have whole sixteens of them, and scales of int8 rows are in the weights. ahead: where the rows of
 * `ahead_bytes` are that are prefetched meanwhile, if any. */
typedef struct {
    const void *rows;
    const int32_t *indices;
    int64_t stride;
    int kind, count, width;
    const char *ahead;
    int64_t ahead_bytes;
} source;

/* BEGIN: out = sum of weights[i] * row i; ADD: the sum begins with what is there; JOIN: out * keep + sum * scale */
enum { BEGIN, ADD, JOIN };
typedef struct {
    float *out;
    const float *weights;
    int how;
    float keep, scale;
} accumulator;

#define MAX_ACCUMULATORS LS_READINGS
/* vectors of a row that `count` accumulators take at once: as many sums as the registers can hold, and enough to
 * hide the time of an addition */
#define COLUMNS(count) ((count) == 1 ? 8 : (count) == 4 && LS_LANES == 8 ? 2 : 4)

/* `parts` vectors from `column` on; the last of them has n floats. apart: from one weight of a sum to the next */
INLINE void accumulate_columns(const source *s, const accumulator *to, int count, int kind, int apart, int column,
                               int parts, int n) {
    vl sums[MAX_ACCUMULATORS][8];
    UNROLL(count, t)
        UNROLL(parts, c) {
            const float *at = to[t].out + column + LS_LANES * c;
            sums[t][c] = to[t].how != ADD ? vl_set1(0.0f) : n < LS_LANES ? vl_load_part(at, n) : vl_load(at);
        }
    int64_t skipped = s->ahead_bytes * column / s->width, share = s->ahead_bytes * parts * LS_LANES / s->width;
    for (int i = 0; i < s->count; i++) {
        const char *row = (const char *)s->rows + (s->indices ? s->indices[i] : i) * s->stride;
        if (s->ahead) prefetch(s->ahead + i * s->ahead_bytes + skipped, share);
        vl weights[MAX_ACCUMULATORS];
        UNROLL(count, t) weights[t] = vl_set1(to[t].weights[i * apart]);
        UNROLL(parts, c) {
            const char *at = row + (column + LS_LANES * c) * feature_bytes(kind);
            vl value = n < LS_LANES ? vl_load_part((const float *)at, n) : load_features(at, kind);
            UNROLL(count, t) sums[t][c] = LS_LANES_FMA(weights[t], value, sums[t][c]);
        }
    }
    UNROLL(count, t)
        UNROLL(parts, c) {
            float *at = to[t].out + column + LS_LANES * c;
            /* of rows of attention, which are padded */
            if (to[t].how == JOIN)
                sums[t][c] = vl_load(at) * vl_set1(to[t].keep) + sums[t][c] * vl_set1(to[t].scale);
            if (n < LS_LANES)
                vl_store_part(at, sums[t][c], n);
            else
                vl_store(at, sums[t][c]);
        }
}

INLINE void accumulate_some(const source *s, const accumulator *to, int count, int kind, int apart) {
    int c = 0, wide = COLUMNS(count) * LS_LANES;
    for (; c + wide <= s->width; c += wide)
        accumulate_columns(s, to, count, kind, apart, c, COLUMNS(count), LS_LANES);
    for (; c + 4 * LS_LANES <= s->width; c += 4 * LS_LANES) accumulate_columns(s, to, count, kind, apart, c, 4, LS_LANES);
    for (; c + LS_LANES <= s->width; c += LS_LANES) accumulate_columns(s, to, count, kind, apart, c, 1, LS_LANES);
    if (c < s->width) accumulate_columns(s, to, count, LS_F32, apart, c, 1, s->width - c);
}

/* how many of `count` come next, so that no one is left over where two could share a load */
INLINE int next_of(int count) {
    if (count <= LS_QUERIES) return count;
    return count == LS_QUERIES + 1 ? (count + 1) / 2 : LS_QUERIES;
}

/* up to LS_QUERIES accumulators; constants, so that the sums stay in registers */
#define ACCUMULATE(form, kind, apart)                                            \
    static void form(const source *s, const accumulator *to, int count) {        \
        if (count == 1) accumulate_some(s, to, 1, kind, apart);                  \
        if (count == 2) accumulate_some(s, to, 2, kind, apart);                  \
        if (count == 3) accumulate_some(s, to, 3, kind, apart);                  \
        if (LS_QUERIES > 3 && count == 4) accumulate_some(s, to, 4, kind, apart); \
    }
ACCUMULATE(accumulate_floats, LS_F32, 1)
ACCUMULATE(accumulate_bfloat16, LS_BF16, 1)
ACCUMULATE(accumulate_float16, LS_F16, 1)
ACCUMULATE(accumulate_codes, LS_INT8, 1)
ACCUMULATE(accumulate_lanes, LS_F32, LS_LANES) /* sums whose weights lie side by side */

/* any number of accumulators over the same rows */
static void accumulate(const source *s, const accumulator *to, int count) {
    for (int n; count > 0; to += n, count -= n) {
        n = next_of(count);
        switch (s->kind) {
            case LS_F32: accumulate_floats(s, to, n); break;
            case LS_BF16: accumulate_bfloat16(s, to, n); break;
            case LS_F16: accumulate_float16(s, to, n); break;
            default: accumulate_codes(s, to, n);
        }
    }
}
