/* Tiles of float32 and bfloat16 weights; arithmetic is float32. Part of the isa_*.c files but those of AVX2,
 * which have avx2_floats.inc.h.
 *
 * LS_FLOAT_ROWS is how many rows the registers of an instruction set can hold at once. The order of
 * additions of a row is the same for any number of rows. */

#define EACH_ROW _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)

/* Lines are prefetched this many bytes ahead: far, as several rows use a line for long. */
#define FLOATS_AHEAD 8192

INLINE vf widen(const uint16_t *p) {
    vh half;
    memcpy(&half, p, sizeof half);
    return vf_bits(__builtin_convertvector(half, vi) << 16);
}

/* x has `stride` rows side by side, of which this part takes `rows` */
INLINE void float_part(const void *w, const float *x, int inputs, int stride, int rows, int bf16,
                       float *out) {
    vf sums[LS_FLOAT_ROWS][2];
    EACH_ROW sums[r][0] = sums[r][1] = vf_set1(0.0f);
    for (int k = 0; k < inputs; k++) {
        const float *at32 = (const float *)w + (size_t)k * LS_TILE;
        const uint16_t *at16 = (const uint16_t *)w + (size_t)k * LS_TILE;
        __builtin_prefetch((const char *)(bf16 ? (const void *)at16 : at32) + FLOATS_AHEAD);
        if (!bf16) __builtin_prefetch((const char *)at32 + FLOATS_AHEAD + 64);
        vf low = bf16 ? widen(at16) : vf_load(at32);
        vf high = bf16 ? widen(at16 + 16) : vf_load(at32 + 16);
        EACH_ROW {
            vf input = vf_set1(x[(size_t)k * stride + r]);
            sums[r][0] = LS_FMA(low, input, sums[r][0]);
            sums[r][1] = LS_FMA(high, input, sums[r][1]);
        }
    }
    EACH_ROW {
        vf_store(out + r * LS_TILE, sums[r][0]);
        vf_store(out + r * LS_TILE + 16, sums[r][1]);
    }
}

INLINE void float_tile(const void *w, const float *x, int inputs, int rows, int bf16, float *out) {
    for (int first = 0; first < rows; first += LS_FLOAT_ROWS) {
        const float *at = x + first;
        float *to = out + first * LS_TILE;
        /* constants, so that the sums stay in registers */
        switch (rows - first < LS_FLOAT_ROWS ? rows - first : LS_FLOAT_ROWS) {
            case 1: float_part(w, at, inputs, rows, 1, bf16, to); break;
            case 2: float_part(w, at, inputs, rows, 2, bf16, to); break;
#if LS_FLOAT_ROWS > 2
            case 3: float_part(w, at, inputs, rows, 3, bf16, to); break;
            case 4: float_part(w, at, inputs, rows, 4, bf16, to); break;
            case 5: float_part(w, at, inputs, rows, 5, bf16, to); break;
            case 6: float_part(w, at, inputs, rows, 6, bf16, to); break;
            case 7: float_part(w, at, inputs, rows, 7, bf16, to); break;
            case 8: float_part(w, at, inputs, rows, 8, bf16, to); break;
#endif
        }
    }
}

static void f32_tile(const float *w, const float *x, int inputs, int rows, float *out) {
    float_tile(w, x, inputs, rows, 0, out);
}

static void bf16_tile(const uint16_t *w, const float *x, int inputs, int rows, float *out) {
    float_tile(w, x, inputs, rows, 1, out);
}
#undef EACH_ROW
