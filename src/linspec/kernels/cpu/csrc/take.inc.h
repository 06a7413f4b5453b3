/* Weighted sums of rows, the end of all that a mixer does. Part of every isa_*.c. */

/* Rows i.. at `rows + places[i] * stride`, or side by side without places. coded: int8 codes, whose
 * scale is in the weights already. ahead: bytes to
 * the row that is asked for meanwhile, if any. */
typedef struct {
    const char *rows;
    const int32_t *places;
    int64_t stride;
    int count, width, coded;
    int64_t ahead;
} source;

/* out = out * keep + sum of weights[i] * row i */
typedef struct {
    float *out;
    const float *weights;
    float keep;
} taker;

#define TAKERS 4 /* that share a row in registers */

/* scale of the coded row at `place` */
INLINE float coded_scale(const char *rows, int64_t place, const ls_mixer *m) {
    float scale;
    memcpy(&scale, rows + place * m->row_bytes + m->row_bytes - 4, sizeof scale);
    return scale;
}

INLINE vf load_codes(const char *codes) {
    vb bytes;
    memcpy(&bytes, codes, sizeof bytes);
    return LS_WIDEN(bytes);
}

/* features column .. column + 15 of a row, of which n < 16 may be there, and zeros behind them */
INLINE vf load_row(const char *row, int column, int n, int coded) {
    if (!coded) {
        const float *at = (const float *)row + column;
        return n < 16 ? vf_load_part(at, n) : vf_load(at);
    }
    if (n >= 16) return load_codes(row + column);
    char part[16] = {0};
    memcpy(part, row + column, (size_t)n);
    return load_codes(part);
}

/* have the lines of columns column .. column + 63 of a row ready */
INLINE void fetch(const char *row, int column, int coded) {
    if (coded) {
        __builtin_prefetch(row + column);
        return;
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
        __builtin_prefetch(row + 4 * column + 64 * i);
}

/* unrolled before registers are given out */
#define EACH_TAKER _Pragma("GCC unroll 4") for (int t = 0; t < count; t++)
#define EACH_PART _Pragma("GCC unroll 4") for (int c = 0; c < parts; c++)

/* 16 * parts features from `column` on; the last of them n < 16, or 16 */
INLINE void take_columns(const source *s, const taker *takers, int count, int coded, int column,
                         int parts, int n) {
    vf sums[TAKERS][4];
    EACH_TAKER
        EACH_PART {
            const float *at = takers[t].out + column + 16 * c;
            sums[t][c] = (n < 16 ? vf_load_part(at, n) : vf_load(at)) * vf_all(takers[t].keep);
        }
    for (int i = 0; i < s->count; i++) {
        const char *row = s->rows + (s->places ? s->places[i] : i) * s->stride;
        if (parts == 4 && s->ahead) fetch(row + s->ahead, column, coded);
        vf values[4];
        EACH_PART values[c] = load_row(row, column + 16 * c, n, coded);
        EACH_TAKER {
            vf weight = vf_all(takers[t].weights[i]);
            EACH_PART sums[t][c] = LS_FMA(weight, values[c], sums[t][c]);
        }
    }
    EACH_TAKER
        EACH_PART {
            float *at = takers[t].out + column + 16 * c;
            if (n < 16)
                vf_store_part(at, sums[t][c], n);
            else
                vf_store(at, sums[t][c]);
        }
}

INLINE void take_some(const source *s, const taker *takers, int count, int coded) {
    int c = 0;
    for (; c + 64 <= s->width; c += 64) take_columns(s, takers, count, coded, c, 4, 16);
    for (; c + 16 <= s->width; c += 16) take_columns(s, takers, count, coded, c, 1, 16);
    if (c < s->width) take_columns(s, takers, count, coded, c, 1, s->width - c);
}

/* constants, so that the sums stay in registers */
#define TAKE(form, coded)                                                    \
    static void form(const source *s, const taker *takers, int count) {      \
        for (; count >= 4; takers += 4, count -= 4) take_some(s, takers, 4, coded); \
        for (; count > 0; takers++, count--) take_some(s, takers, 1, coded); \
    }
TAKE(take_floats, 0)
TAKE(take_codes, 1)

/* any number of takers of the same rows */
static void take(const source *s, const taker *takers, int count) {
    s->coded ? take_codes(s, takers, count) : take_floats(s, takers, count);
}
