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
    if (f == LS_SILU) return x / (one + vf_exp(-x));
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

/* constants, so that no loop asks which */
static void activate(int f, const float *gate, const float *up, int width, float *y) {
    if (f == LS_SILU) activate_row(LS_SILU, gate, up, width, y);
    if (f == LS_GELU) activate_row(LS_GELU, gate, up, width, y);
    if (f == LS_GELU_TANH) activate_row(LS_GELU_TANH, gate, up, width, y);
    if (f == LS_RELU) activate_row(LS_RELU, gate, up, width, y);
}

static void cap_row(float *x, float cap, int width) {
    for (int i = 0; i < width; i += 16)
        store_first(x + i, vf_capped(first_of(x + i, width - i), cap), width - i);
}
