/* Work on single rows: quantization, norm, gated activation. Part of every isa_*.c. */

/* Symmetric codes -127..127 of one row, padded with zeros; returns the scale.
 * A row that holds a NaN or an infinity gets the scale NaN, so that it cannot pass unnoticed. */
static float quantization_scale(const float *x, int width, vf *inverse) {
    vf top = vf_set1(0.0f), not_finite = top;
    int whole = width & ~15;
    for (int i = 0; i < whole; i += 16) {
        vf v = vf_abs(vf_load(x + i));
        top = vf_max(top, v);
        not_finite += v * vf_set1(0.0f);
    }
    if (whole < width) {
        vf v = vf_abs(vf_load_part(x + whole, width - whole));
        top = vf_max(top, v);
        not_finite += v * vf_set1(0.0f);
    }
    float most = vf_largest(top);
    /* rows below 4e-37 have no inverse: they are zeros */
    float factor = most > 0.0f ? 127.0f / most : 0.0f;
    *inverse = vf_set1(__builtin_isfinite(factor) ? factor : 0.0f);
    return most / 127.0f + vf_sum(not_finite);
}

/* The codes of a row whose scale is NaN: any other would overflow when they are added up. */
static float zero_row(int padded, int rows, int per_group, int8_t *codes, int32_t *offsets,
                      float scale) {
    for (int q = 0; q < padded / 4; q++) memset(codes + (size_t)q * rows * 4, 0, 4);
    for (int g = 0; g < (per_group ? padded / LS_GROUP : 1); g++) offsets[(size_t)g * rows] = 0;
    return scale;
}

static float quantize_row(const float *x, int width, int padded, int rows, int per_group,
                          int8_t *codes, int32_t *offsets) {
    vf inverse;
    float scale = quantization_scale(x, width, &inverse);
    if (!__builtin_isfinite(scale)) return zero_row(padded, rows, per_group, codes, offsets, scale);
    int32_t total = 0;
    for (int i = 0; i < padded; i += LS_GROUP) {
        int32_t four[8], sum;
        vi both = {0};
        for (int half = 0; half < 2; half++) {
            int at = i + 16 * half;
            int n = width - at < 16 ? (width > at ? width - at : 0) : 16;
            vi whole = vf_round((n == 16 ? vf_load(x + at) : vf_load_part(x + at, n)) * inverse);
            vb bytes = LS_NARROW(whole);
            memcpy(four + 4 * half, &bytes, sizeof bytes);
            both += whole;
        }
        for (int q = 0; q < 8; q++)
            memcpy(codes + ((size_t)(i / 4 + q) * rows) * 4, four + q, 4);
        sum = vi_sum(both);
        if (per_group) offsets[(size_t)(i / LS_GROUP) * rows] = -8 * sum;
        total += sum;
    }
    if (!per_group) *offsets = -128 * total;
    return scale;
}

/* to the nearest bfloat16, ties to even; one NaN stands for all */
INLINE vli narrow_bfloat16(vl x) {
    /* not of a NaN, whose bits have no room for an addition */
    vli number = (vli)(x == x), bits = vli_bits(x) & number, even = (bits >> 16) & 1;
    return ((bits + 0x7fff + even) >> 16) | (~number & 0x7fc0);
}

/* The same for float16. Below its smallest normal number, adding 0.5 leaves room for just its fraction. */
INLINE vli narrow_float16(vl x) {
    vli bits = vli_bits(x), size = bits & 0x7fffffff, even = (size >> 13) & 1;
    vli normal = (size - (112 << 23) + 0xfff + even) >> 13;
    vli small = vli_bits(vl_bits(size) + vl_set1(0.5f)) - vli_bits(vl_set1(0.5f));
    vli is_small = size < 0x38800000, is_large = size >= 0x47800000, is_nan = size > 0x7f800000;
    vli kept = (is_small & small) | (~is_small & normal);
    kept = (is_large & 0x7c00) | (~is_large & kept) | (is_nan & 0x7e00);
    return kept | ((bits >> 16) & 0x8000);
}

/* x as 16-bit floats: `kind` is LS_BF16 or LS_F16 */
static void narrow_row(const float *x, int width, int kind, uint16_t *to) {
    for (int i = 0; i < width; i += LS_LANES) {
        int n = width - i < LS_LANES ? width - i : LS_LANES;
        vl v = n < LS_LANES ? vl_load_part(x + i, n) : vl_load(x + i);
        vlh half = __builtin_convertvector(kind == LS_F16 ? narrow_float16(v) : narrow_bfloat16(v), vlh);
        memcpy(to + i, &half, (size_t)n * sizeof *to);
    }
}

static void copy_row(const float *x, int width, int rows, float *to) {
    if (rows == 1) {
        memcpy(to, x, (size_t)width * sizeof *x);
        return;
    }
    for (int k = 0; k < width; k++) to[(size_t)k * rows] = x[k];
}

static void epilogue(const ls_epilogue *to, int rows, const float *sums, float *y) {
    for (int half = 0; half < LS_TILE; half += 16) {
        int width = to->width - half < 16 ? to->width - half : 16;
        if (width <= 0) return;
        vf scale = to->channel_scales ? vf_load(to->channel_scales + half) : vf_set1(1.0f);
        vf bias = vf_set1(0.0f);
        if (to->bias) bias = width == 16 ? vf_load(to->bias + half) : vf_load_part(to->bias + half, width);
        for (int r = 0; r < rows; r++) {
            float *at = y + r * to->stride + half;
            vf v = vf_load(sums + r * LS_TILE + half);
            if (to->row_scales) v = v * vf_set1(to->row_scales[r]) * scale;
            if (to->bias) v += bias;
            if (width == 16) {
                vf_store(at, to->add ? v + vf_load(at) : v);
            } else {
                vf_store_part(at, to->add ? v + vf_load_part(at, width) : v, width);
            }
        }
    }
}

static void rms_norm(const float *x, const float *weight, float eps, int width, float *y) {
    vf squares = vf_set1(0.0f);
    int whole = width & ~15, rest = width - whole;
    for (int i = 0; i < whole; i += 16) squares = LS_FMA(vf_load(x + i), vf_load(x + i), squares);
    if (rest) {
        vf v = vf_load_part(x + whole, rest);
        squares = LS_FMA(v, v, squares);
    }
    vf scale = vf_set1(1.0f / __builtin_sqrtf(vf_sum(squares) / (float)width + eps));
    for (int i = 0; i < whole; i += 16)
        vf_store(y + i, vf_load(x + i) * scale * vf_load(weight + i));
    if (rest)
        vf_store_part(
            y + whole, vf_load_part(x + whole, rest) * scale * vf_load_part(weight + whole, rest),
            rest);
}

/* One over the length of x; rows that are all zero, such as padding, stay zero. */
static float inverse_length(const float *x, int width) {
    vf squares = vf_set1(0.0f);
    for (int i = 0; i < width; i += 16) {
        vf v = width - i < 16 ? vf_load_part(x + i, width - i) : vf_load(x + i);
        squares = LS_FMA(v, v, squares);
    }
    float length = __builtin_sqrtf(vf_sum(squares));
    return 1.0f / (length > 1e-6f ? length : 1e-6f);
}

static void normalize(float *x, int width) {
    float scale = inverse_length(x, width);
    for (int i = 0; i < width; i++) x[i] *= scale;
}

INLINE vf silu(vf x) { return x / (vf_set1(1.0f) + vf_exp(-x)); }

static void silu_mul(const float *gate, const float *up, int width, float *y) {
    int whole = width & ~15, rest = width - whole;
    for (int i = 0; i < whole; i += 16)
        vf_store(y + i, silu(vf_load(gate + i)) * vf_load(up + i));
    if (rest)
        vf_store_part(
            y + whole, silu(vf_load_part(gate + whole, rest)) * vf_load_part(up + whole, rest), rest);
}
