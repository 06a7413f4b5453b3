/* Weighted sums of rows: the end of all that a mixer does. Part of every isa_*.c. */

/* Row i is at `rows + indices[i] * stride`, or the i-th without indices. quantized: int8 codes, whose
 * scale is in the weights already. prefetch_bytes: to the row that is prefetched meanwhile, if any. */
typedef struct {
    const char *rows;
    const int32_t *indices;
    int64_t stride;
    int count, width, quantized;
    int64_t prefetch_bytes;
} source;

/* out = out * keep + sum of weights[i] * row i */
typedef struct {
    float *out;
    const float *weights;
    float keep;
} accumulator;

#define MAX_ACCUMULATORS 4 /* that share a load of a row */

/* scale of a quantized row */
INLINE float row_scale(const char *rows, int64_t index, const ls_mixer *m) {
    float scale;
    memcpy(&scale, rows + index * m->row_bytes + m->row_bytes - 4, sizeof scale);
    return scale;
}

INLINE vf load_codes(const char *codes) {
    vb bytes;
    memcpy(&bytes, codes, sizeof bytes);
    return LS_WIDEN(bytes);
}

/* features column .. column + 15 of a row, of which n < 16 may be there, and zeros behind them */
INLINE vf load_row(const char *row, int column, int n, int quantized) {
    if (!quantized) {
        const float *at = (const float *)row + column;
        return n < 16 ? vf_load_part(at, n) : vf_load(at);
    }
    if (n >= 16) return load_codes(row + column);
    char part[16] = {0};
    memcpy(part, row + column, (size_t)n);
    return load_codes(part);
}

/* columns column .. column + 63 of a row */
INLINE void prefetch(const char *row, int column, int quantized) {
    if (quantized) {
        __builtin_prefetch(row + column);
        return;
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
        __builtin_prefetch(row + 4 * column + 64 * i);
}

/* unrolled before registers are given out */
#define EACH_ACCUMULATOR _Pragma("GCC unroll 4") for (int t = 0; t < count; t++)
#define EACH_PART _Pragma("GCC unroll 4") for (int c = 0; c < parts; c++)

/* 16 * parts features from `column` on; the last of them n < 16, or 16 */
INLINE void accumulate_columns(const source *s, const accumulator *to, int count, int quantized,
                               int column, int parts, int n) {
    vf sums[MAX_ACCUMULATORS][4];
    EACH_ACCUMULATOR
        EACH_PART {
            const float *at = to[t].out + column + 16 * c;
            sums[t][c] = (n < 16 ? vf_load_part(at, n) : vf_load(at)) * vf_set1(to[t].keep);
        }
    for (int i = 0; i < s->count; i++) {
        const char *row = s->rows + (s->indices ? s->indices[i] : i) * s->stride;
        if (parts == 4 && s->prefetch_bytes) prefetch(row + s->prefetch_bytes, column, quantized);
        vf values[4];
        EACH_PART values[c] = load_row(row, column + 16 * c, n, quantized);
        EACH_ACCUMULATOR {
            vf weight = vf_set1(to[t].weights[i]);
            EACH_PART sums[t][c] = LS_FMA(weight, values[c], sums[t][c]);
        }
    }
    EACH_ACCUMULATOR
        EACH_PART {
            float *at = to[t].out + column + 16 * c;
            if (n < 16)
                vf_store_part(at, sums[t][c], n);
            else
                vf_store(at, sums[t][c]);
        }
}

INLINE void accumulate_rows(const source *s, const accumulator *to, int count, int quantized) {
    int c = 0;
    for (; c + 64 <= s->width; c += 64) accumulate_columns(s, to, count, quantized, c, 4, 16);
    for (; c + 16 <= s->width; c += 16) accumulate_columns(s, to, count, quantized, c, 1, 16);
    if (c < s->width) accumulate_columns(s, to, count, quantized, c, 1, s->width - c);
}

/* constants, so that the sums stay in registers */
#define ACCUMULATE(form, quantized)                                                     \
    static void form(const source *s, const accumulator *to, int count) {               \
        for (; count >= 4; to += 4, count -= 4) accumulate_rows(s, to, 4, quantized);   \
        for (; count > 0; to++, count--) accumulate_rows(s, to, 1, quantized);          \
    }
ACCUMULATE(accumulate_float, 0)
ACCUMULATE(accumulate_int8, 1)

/* any number of accumulators over the same rows */
static void accumulate(const source *s, const accumulator *to, int count) {
    s->quantized ? accumulate_int8(s, to, count) : accumulate_float(s, to, count);
}
