/* Work on single rows: quantization, norm, gated activation. Part of every isa_*.c.
 *
 * Where lanes do not matter these are plain loops, in which a compiler finds its vectors, whatever their size. */

/* The largest |x|. As integers the bits of positive floats are in the order of the floats; an infinity comes behind
 * all of them, and then what is not a number. */
INLINE float largest_size(const float *x, int width) {
    int32_t most = 0;
    for (int i = 0; i < width; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float size;
    memcpy(&size, &most, sizeof size);
    return size;
}

/* Codes of sixteen inputs, fours `stride` fours apart; returns their sum. The nearest integers, ties to even: adding
 * 1.5 * 2^23 leaves no room for a fraction. */
INLINE int32_t quantize_half(const float *x, float inverse, int stride, int8_t *codes) {
    const int32_t magic = 0x4b400000; /* the bits of that number */
    int32_t sum = 0;
    int8_t line[LS_GROUP / 2];
    for (int i = 0; i < LS_GROUP / 2; i++) {
        float shifted = x[i] * inverse + 12582912.0f;
        int32_t bits;
        memcpy(&bits, &shifted, sizeof bits);
        sum += bits - magic;
        line[i] = (int8_t)(bits - magic);
    }
    for (int q = 0; q < LS_GROUP / 8; q++) memcpy(codes + (size_t)q * stride * 4, line + 4 * q, 4);
    return sum;
}

/* the same for a whole group */
INLINE int32_t quantize_group(const float *x, float inverse, int stride, int8_t *codes) {
    int32_t sum = quantize_half(x, inverse, stride, codes);
    return sum + quantize_half(x + LS_GROUP / 2, inverse, stride, codes + (size_t)stride * LS_GROUP / 2);
}

/* What turns inputs of this size into codes. Below 4e-37 there is no inverse: such rows are zeros. */
INLINE float inverse_scale(float most) {
    float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    return __builtin_isfinite(inverse) ? inverse : 0.0f;
}

/* the same for a group of which only `width` inputs are there */
static int32_t quantize_part(const float *x, int width, float inverse, int stride, int8_t *codes) {
    float part[LS_GROUP] = {0};
    memcpy(part, x, (size_t)width * sizeof *x);
    return quantize_group(part, inverse, stride, codes);
}

/* The codes of a row whose scale is NaN: any other would overflow when they are added up. */
static float zero_row(int padded, int rows, int per_group, int8_t *codes, int32_t *offsets,
                      float scale) {
    for (int q = 0; q < padded / 4; q++) memset(codes + (size_t)q * rows * 4, 0, 4);
    for (int g = 0; g < (per_group ? padded / LS_GROUP : 1); g++) offsets[(size_t)g * rows] = 0;
    return scale;
}

/* Symmetric codes -127..127 of one row, padded with zeros; returns the scale.
 * A row that holds a NaN or an infinity gets the scale NaN, so that it cannot pass unnoticed. */
static float quantize_row(const float *x, int width, int padded, int rows, int per_group,
                          int8_t *codes, int32_t *offsets) {
    float most = largest_size(x, width), scale = most / 127.0f;
    if (!__builtin_isfinite(most))
        return zero_row(padded, rows, per_group, codes, offsets, __builtin_nanf(""));
    float inverse = inverse_scale(most);
    int32_t total = 0;
    for (int i = 0; i < padded; i += LS_GROUP) {
        int8_t *to = codes + (size_t)i * rows;
        int32_t sum = i + LS_GROUP <= width ? quantize_group(x + i, inverse, rows, to)
                                            : quantize_part(x + i, width - i, inverse, rows, to);
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

INLINE void epilogue_rows(const ls_epilogue *to, int rows, int width, const float *restrict scales,
                          const float *restrict bias, const float *restrict sums, float *restrict y) {
    int64_t stride = to->stride;
    int add = to->add;
    for (int r = 0; r < rows; r++, sums += LS_TILE, y += stride) {
        float row_scale = to->row_scales ? to->row_scales[r] : 1.0f;
        if (add)
            for (int c = 0; c < width; c++) y[c] = sums[c] * row_scale * scales[c] + bias[c] + y[c];
        else
            for (int c = 0; c < width; c++) y[c] = sums[c] * row_scale * scales[c] + bias[c];
    }
}

static void epilogue(const ls_epilogue *to, int rows, const float *sums, float *y) {
    float ones[LS_TILE], bias[LS_TILE];
    const float *scales = to->channel_scales ? to->channel_scales : ones;
    int width = to->width;
    /* minus zero changes no sum, not even minus zero */
    for (int c = 0; c < LS_TILE; c++) ones[c] = 1.0f, bias[c] = -0.0f;
    if (to->bias) memcpy(bias, to->bias, (size_t)width * sizeof *bias);
    if (width == LS_TILE)
        epilogue_rows(to, rows, LS_TILE, scales, bias, sums, y);
    else
        epilogue_rows(to, rows, width, scales, bias, sums, y);
}

/* in sixteen partial sums, a register at a time */
static float sum_of_squares(const float *x, int width) {
    vl sums[LS_PARTS];
    float part[16] = {0};
    int whole = width & ~15;
    UNROLL(LS_PARTS, h) sums[h] = vl_set1(0.0f);
    if (whole < width) memcpy(part, x + whole, (size_t)(width - whole) * sizeof *x);
    for (int i = 0; i < width; i += 16) {
        const float *from = i < whole ? x + i : part;
        UNROLL(LS_PARTS, h) {
            vl v = vl_load(from + h * LS_LANES);
            sums[h] = LS_LANES_FMA(v, v, sums[h]);
        }
    }
    return vl_sum(vl_folded(sums));
}

static void rms_norm(const float *x, const float *weight, float eps, int width, float *y) {
    float scale = 1.0f / __builtin_sqrtf(sum_of_squares(x, width) / (float)width + eps);
    int i = 0;
    for (; i + LS_LANES <= width; i += LS_LANES)
        vl_store(y + i, vl_load(x + i) * vl_set1(scale) * vl_load(weight + i));
    for (; i < width; i++) y[i] = x[i] * scale * weight[i];
}

/* One over the length of x; rows that are all zero, such as padding, stay zero. */
static float inverse_length(const float *x, int width) {
    float length = __builtin_sqrtf(sum_of_squares(x, width));
    return 1.0f / (length > 1e-6f ? length : 1e-6f);
}

static void normalize(float *x, int width) {
    float scale = inverse_length(x, width);
    for (int i = 0; i < width; i++) x[i] *= scale;
}

/* the first `n` of sixteen floats, zeros behind them */
INLINE vf first_of(const float *x, int n) { return n < 16 ? vf_load_part(x, n) : vf_load(x); }

INLINE void store_first(float *y, vf v, int n) { n < 16 ? vf_store_part(y, v, n) : vf_store(y, v); }

static void layer_norm(const float *x, const float *weight, const float *bias, float eps, int width,
                       float *y) {
    vf sum = vf_set1(0.0f), squares = sum;
    for (int i = 0; i < width; i += 16) sum += first_of(x + i, width - i);
    vf mean = vf_set1(vf_sum(sum) / (float)width);
    for (int i = 0; i < width; i += 16) {
        vf v = first_of(x + i, width - i) - mean;
        if (width - i < 16) {
            float part[16];
            vf_store(part, v);
            v = vf_load_part(part, width - i);
        }
        squares = LS_FMA(v, v, squares);
    }
    vf scale = vf_set1(1.0f / __builtin_sqrtf(vf_sum(squares) / (float)width + eps));
    for (int i = 0; i < width; i += 16) {
        vf v = (first_of(x + i, width - i) - mean) * scale * first_of(weight + i, width - i);
        store_first(y + i, bias ? v + first_of(bias + i, width - i) : v, width - i);
    }
}

INLINE vf activated(int f, vf x) {
    const vf half = vf_set1(0.5f), one = vf_set1(1.0f);
    if (f == LS_RELU) return vf_max(vf_set1(0.0f), x);
    if (f == LS_GELU) return x * half * (one + vf_erf(x * vf_set1(0.707106781f)));
    vf cubic = x + vf_set1(0.044715f) * x * x * x;
    return half * x * (one + vf_tanh(vf_set1(0.797884561f) * cubic));
}

INLINE void activate_row(int f, const float *gate, const float *up, int width, float *y) {
    for (int i = 0; i < width; i += 16) {
        vf v = activated(f, first_of(gate + i, width - i));
        store_first(y + i, up ? v * first_of(up + i, width - i) : v, width - i);
    }
}

INLINE vl silu(vl x) { return x / (vl_set1(1.0f) + vl_exp(-x)); }

/* a register at a time: most models have this one */
static void silu_row(const float *gate, const float *up, int width, float *y) {
    int i = 0;
    for (; i + LS_LANES <= width; i += LS_LANES) {
        vl v = silu(vl_load(gate + i));
        vl_store(y + i, up ? v * vl_load(up + i) : v);
    }
    if (i == width) return;
    vl v = silu(vl_load_part(gate + i, width - i));
    vl_store_part(y + i, up ? v * vl_load_part(up + i, width - i) : v, width - i);
}

/* constants, so that no loop asks which */
static void activate(int f, const float *gate, const float *up, int width, float *y) {
    if (f == LS_SILU) silu_row(gate, up, width, y);
    if (f == LS_GELU) activate_row(LS_GELU, gate, up, width, y);
    if (f == LS_GELU_TANH) activate_row(LS_GELU_TANH, gate, up, width, y);
    if (f == LS_RELU) activate_row(LS_RELU, gate, up, width, y);
}

static void cap_row(float *x, float cap, int width) {
    int i = 0;
    for (; i + LS_LANES <= width; i += LS_LANES) vl_store(x + i, vl_capped(vl_load(x + i), cap));
    if (i < width) vl_store_part(x + i, vl_capped(vl_load_part(x + i, width - i), cap), width - i);
}
