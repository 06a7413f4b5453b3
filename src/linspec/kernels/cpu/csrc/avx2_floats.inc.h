/* Tiles of float32 and bfloat16 weights on 256-bit registers; part of avx2_tiles.inc.h. The compiler keeps
 * vectors of sixteen floats (float_tiles.inc.h) in memory here. */

/* two panels: eight rows take long for one, and its lines come late if they are asked for during the one before */
#define FLOATS_AHEAD (2 * PANEL_BYTES)

INLINE __m256 eight_floats(const void *w, int at, int bf16) {
    if (!bf16) return _mm256_loadu_ps((const float *)w + at);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)w + at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* `octets` octets of `rows` rows over a panel; x has `stride` rows side by side */
INLINE void float_part(const char *w, const float *x, int inputs, int stride, int rows, int octets,
                       int bf16, const char *ahead, int step, float *sums) {
    __m256 s[5][4];
    EACH_OF(rows, r)
        EACH_OF(octets, o) s[r][o] = _mm256_loadu_ps(sums + r * LS_TILE + 8 * o);
    for (int k = 0; k < inputs; k++, w += bf16 ? 64 : 128, x += stride, ahead += step) {
        _mm_prefetch(ahead, _MM_HINT_T0);
        if (step > 64) _mm_prefetch(ahead + 64, _MM_HINT_T0);
        __m256 inputs[5];
        EACH_OF(rows, r) inputs[r] = _mm256_set1_ps(x[r]);
        EACH_OF(octets, o) {
            __m256 weights = eight_floats(w, 8 * o, bf16);
            EACH_OF(rows, r) s[r][o] = _mm256_fmadd_ps(weights, inputs[r], s[r][o]);
        }
    }
    EACH_OF(rows, r)
        EACH_OF(octets, o) _mm256_storeu_ps(sums + r * LS_TILE + 8 * o, s[r][o]);
}

/* `rows` rows of a panel, which are the parts from `part` on of all that share its prefetches */
INLINE void float_rows(const char *w, const float *x, int inputs, int stride, int rows, int bf16,
                       int part, int parts, float *sums) {
    const int octets = rows < 4 ? 4 : 2, size = bf16 ? 2 : 4, step = LS_TILE * size / parts;
    for (int o = 0; o < 4; o += octets, part++)
        float_part(w + 8 * o * size, x, inputs, stride, rows, octets, bf16,
                   w + FLOATS_AHEAD + (size_t)part * inputs * step, step, sums + 8 * o);
}

/* a block of `rows` rows, six and more as two halves */
INLINE void float_panel(const char *w, const float *x, int inputs, int bf16, float *sums,
                        int rows) {
    const int first = rows < 6 ? rows : (rows + 1) / 2, rest = rows - first;
    const int before = first < 4 ? 1 : 2, parts = before + (rest == 0 ? 0 : rest < 4 ? 1 : 2);
    float_rows(w, x, inputs, rows, first, bf16, 0, parts, sums);
    if (rest)
        float_rows(w, x + first, inputs, rows, rest, bf16, before, parts, sums + first * LS_TILE);
}

INLINE void float_tile(const char *w, const float *x, int inputs, int rows, int bf16, float *out) {
    const int line = LS_TILE * (bf16 ? 2 : 4), most = PANEL_BYTES / line;
    for (int i = 0; i < rows * LS_TILE; i++) out[i] = 0.0f;
    for (int done = 0, n; done < inputs; done += n, w += (size_t)n * line, x += (size_t)n * rows) {
        n = inputs - done < most ? inputs - done : most;
        BY_ROWS(float_panel, w, x, n, bf16, out)
    }
}

static void f32_tile(const float *w, const float *x, int inputs, int rows, float *out) {
    float_tile((const char *)w, x, inputs, rows, 0, out);
}

static void bf16_tile(const uint16_t *w, const float *x, int inputs, int rows, float *out) {
    float_tile((const char *)w, x, inputs, rows, 1, out);
}
