/* Tiles for AVX2, with or without VNNI: sixteen registers, so two rows and sixteen channels at once.
 * The including file defines DOT(sum, w, x): sum + four products of signed codes per lane.
 *
 * Weights become signed here, as 8-bit unsigned ones would overflow the 16-bit sums of AVX2's own
 * multiplication; |codes| <= 127 cannot. */
#define PART 4 /* rows */
#define EACH_ROW _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++)

INLINE __m256i broadcast4(const int8_t *four) {
    int32_t bits;
    memcpy(&bits, four, sizeof bits);
    return _mm256_set1_epi32(bits);
}

/* channels 16 half .. 16 half + 15 of `rows` rows of a block that is `stride` wide */
INLINE void int8_part(const uint8_t *w, const int8_t *x, int quads, int stride, int rows,
                      float *out) {
    const __m256i sign = _mm256_set1_epi8(-128);
    __m256i sums[PART][2];
    EACH_ROW sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (int q = 0; q < quads; q++, w += 128, x += 4 * stride) {
        _mm_prefetch((const char *)w + 2048, _MM_HINT_T0);
        __m256i w0 = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)w), sign);
        __m256i w1 = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(w + 32)), sign);
        EACH_ROW {
            __m256i input = broadcast4(x + 4 * r);
            sums[r][0] = DOT(sums[r][0], w0, input);
            sums[r][1] = DOT(sums[r][1], w1, input);
        }
    }
    EACH_ROW
        for (int i = 0; i < 2; i++)
            _mm256_storeu_ps(out + r * LS_TILE + 8 * i, _mm256_cvtepi32_ps(sums[r][i]));
}

static void int8_tile(const uint8_t *w, const int8_t *x, const int32_t *offsets, int quads,
                      int rows, float *out) {
    (void)offsets; /* the weights are signed again */
    for (int first = 0; first < rows; first += PART)
        for (int half = 0; half < 2; half++) {
            const uint8_t *from = w + 64 * half;
            const int8_t *at = x + 4 * first;
            float *to = out + first * LS_TILE + 16 * half;
            switch (rows - first) {
                case 1: int8_part(from, at, quads, rows, 1, to); break;
                case 2: int8_part(from, at, quads, rows, 2, to); break;
                case 3: int8_part(from, at, quads, rows, 3, to); break;
                default: int8_part(from, at, quads, rows, 4, to);
            }
        }
}

INLINE __m256 scales_at(const uint8_t *p) {
    __m128i half = _mm_loadu_si128((const __m128i *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* eight channels of one group of inputs: sums[r] += scale * (codes . x) */
INLINE void int4_eight(const uint8_t *codes, const int8_t *x, __m256 scale, int stride, int rows,
                       __m256 *sums) {
    const __m256i nibble = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
    __m256i dots[PART];
    EACH_ROW dots[r] = _mm256_setzero_si256();
    for (int q = 0; q < 4; q++) {
        __m256i both = _mm256_loadu_si256((const __m256i *)(codes + 128 * q));
        __m256i low = _mm256_sub_epi8(_mm256_and_si256(both, nibble), eight);
        __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        high = _mm256_sub_epi8(high, eight);
        EACH_ROW {
            dots[r] = DOT(dots[r], low, broadcast4(x + (q * stride + r) * 4));
            dots[r] = DOT(dots[r], high, broadcast4(x + ((q + 4) * stride + r) * 4));
        }
    }
    EACH_ROW
        sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r]), scale, sums[r]);
}

INLINE void int4_part(const uint8_t *w, const int8_t *x, int groups, int stride, int rows,
                      float *out) {
    __m256 sums[4][PART];
    for (int i = 0; i < 4; i++)
        EACH_ROW sums[i][r] = _mm256_setzero_ps();
    for (int g = 0; g < groups; g++, w += LS_INT4_BYTES, x += 32 * stride) {
        for (int line = 0; line < LS_INT4_BYTES; line += 64)
            _mm_prefetch((const char *)w + 2048 + line, _MM_HINT_T0);
        for (int i = 0; i < 4; i++)
            int4_eight(w + 64 + 32 * i, x, scales_at(w + 16 * i), stride, rows, sums[i]);
    }
    for (int i = 0; i < 4; i++)
        EACH_ROW _mm256_storeu_ps(out + r * LS_TILE + 8 * i, sums[i][r]);
}

static void int4_tile(const uint8_t *w, const int8_t *x, const int32_t *offsets, int groups,
                      int rows, float *out) {
    (void)offsets;
    for (int first = 0; first < rows; first += PART) {
        const int8_t *at = x + 4 * first;
        float *to = out + first * LS_TILE;
        switch (rows - first) {
            case 1: int4_part(w, at, groups, rows, 1, to); break;
            case 2: int4_part(w, at, groups, rows, 2, to); break;
            case 3: int4_part(w, at, groups, rows, 3, to); break;
            default: int4_part(w, at, groups, rows, 4, to);
        }
    }
}
