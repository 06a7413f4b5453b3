/* Weights in blocks: packed from random bytes of a file, against what the file's format says of these
 * bytes, input by input. Part of proof.c. */

int32_t ls_pack_blocks(int32_t format, const uint8_t *raw, const int64_t *order, int32_t outputs,
                       int32_t inputs, uint8_t *to, int32_t threads);
void ls_block_rows_at(const ls_linear_part *part, int32_t inputs, const int64_t *channels, int32_t count,
                      float *to, int32_t threads);

typedef struct {
    int format, inputs, bytes, halves; /* of a block; where its 16-bit floats are */
} file_format;

static const file_format FILE_FORMATS[] = {
    {LS_Q8_0, 32, 34, 0},    {LS_Q4_0, 32, 18, 0},   {LS_Q4_1, 32, 20, 0},
    {LS_Q5_0, 32, 22, 0},    {LS_Q5_1, 32, 24, 0},   {LS_IQ4_NL, 32, 18, 0},
    {LS_Q4_K, 256, 144, 0},  {LS_Q5_K, 256, 176, 0}, {LS_Q6_K, 256, 210, 208},
};

/* one weight of a block: scale * code + minimum */
typedef struct {
    float scale, minimum;
    int code, minima;
} weight;

static float from_half(const uint8_t *at) {
    int bits = at[0] | at[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
    double f = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return (float)(bits >> 15 ? -f : f);
}

static int nibble(const uint8_t *at, int i) { return i < 16 ? at[i] & 15 : at[i - 16] >> 4; }

static int bit(const uint8_t *at, int i) { return at[i / 8] >> i % 8 & 1; }

/* formats of 256: the formulas of llama.cpp's dequantization */
static weight k_weight(int format, const uint8_t *b, int i) {
    if (format == LS_Q6_K) {
        int half = i / 128, quarter = i % 128 / 32, l = i % 32;
        int low = b[64 * half + 32 * (quarter & 1) + l], high = b[128 + 32 * half + l];
        int code = (quarter < 2 ? low & 15 : low >> 4) | (high >> 2 * quarter & 3) << 4;
        return (weight){from_half(b + 208) * (float)(int8_t)b[192 + i / 16], 0.0f, code - 32, 0};
    }
    int j = i / 32, l = i % 32, s, m;
    const uint8_t *f = b + 4, *low = b + (format == LS_Q5_K ? 48 : 16);
    if (j < 4) {
        s = f[j] & 63, m = f[j + 4] & 63;
    } else {
        s = (f[j + 4] & 15) | f[j - 4] >> 6 << 4, m = f[j + 4] >> 4 | f[j] >> 6 << 4;
    }
    int code = j % 2 ? low[32 * (j / 2) + l] >> 4 : low[32 * (j / 2) + l] & 15;
    if (format == LS_Q5_K) code |= (b[16 + l] >> j & 1) << 4;
    return (weight){from_half(b) * (float)s, -from_half(b + 2) * (float)m, code, 1};
}

static weight weight_of(int format, const uint8_t *b, int i) {
    static const int levels[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                 1,    13,   25,  38,  53,  69,  89,  113};
    float d = from_half(b), m = from_half(b + 2);
    switch (format) {
        case LS_Q8_0: return (weight){d, 0.0f, (int8_t)b[2 + i], 0};
        case LS_Q4_0: return (weight){d, 0.0f, nibble(b + 2, i) - 8, 0};
        case LS_Q4_1: return (weight){d, m, nibble(b + 4, i), 1};
        case LS_Q5_0: return (weight){d, 0.0f, nibble(b + 6, i) + 16 * bit(b + 2, i) - 16, 0};
        case LS_Q5_1: return (weight){d, m, nibble(b + 8, i) + 16 * bit(b + 4, i), 1};
        case LS_IQ4_NL: return (weight){d, 0.0f, levels[nibble(b + 2, i)], 0};
        default: return k_weight(format, b, i);
    }
}

/* bytes of a file; scales are zero, subnormal, ordinary and the largest, and never infinite */
static uint8_t *some_blocks(const file_format *f, size_t count, int style) {
    static const uint16_t halves[] = {0, 0x8000, 1, 0x83ff, 0x2e66, 0xa123, 0x3c00, 0x7bff, 0xfbff};
    uint8_t *raw = need(count * (size_t)f->bytes);
    for (size_t i = 0; i < count * (size_t)f->bytes; i++)
        raw[i] = style == RANDOM ? (uint8_t)next() : style == LOWEST ? 0 : 255;
    for (size_t i = 0; i < count; i++)
        for (int k = 0; k < 1 + weight_of(f->format, raw + i * (size_t)f->bytes, 0).minima; k++) {
            uint16_t half = halves[next() % (sizeof halves / sizeof *halves)];
            memcpy(raw + i * (size_t)f->bytes + f->halves + 2 * k, &half, 2);
        }
    return raw;
}

/* one output of one row, group by group: scale before minimum */
static float block_sum(const file_format *f, const uint8_t *raw, const float *x, int inputs) {
    float sum = 0.0f;
    int step = f->format == LS_Q6_K ? 16 : 32;
    for (int g = 0; g < inputs; g += LS_GROUP) {
        const uint8_t *b = raw + g / f->inputs * f->bytes;
        int32_t codes[LS_GROUP];
        float scale = codes_of(x + g, LS_GROUP, LS_GROUP, codes);
        int64_t total = 0;
        for (int k = 0; k < LS_GROUP; k += step) {
            int64_t dot = 0;
            for (int i = k; i < k + step; i++) {
                dot += (int64_t)codes[i] * weight_of(f->format, b, g % f->inputs + i).code;
                total += codes[i];
            }
            sum = fmaf((float)dot, weight_of(f->format, b, g % f->inputs + k).scale * scale, sum);
        }
        weight w = weight_of(f->format, b, g % f->inputs);
        if (w.minima) sum = fmaf(w.minimum, scale * (float)total, sum);
    }
    return sum;
}

static void same_weights(const file_format *f, const uint8_t *raw, const ls_linear_part *part, int inputs,
                         const int64_t *channels) {
    float *found = need(sizeof *found * (size_t)(part->outputs * inputs));
    ls_block_rows_at(part, inputs, channels, part->outputs, found, 2);
    for (int n = 0; n < part->outputs; n++)
        for (int i = 0; i < inputs; i++) {
            const uint8_t *b = raw + (size_t)((n * inputs + i) / f->inputs * f->bytes);
            weight w = weight_of(f->format, b, i % f->inputs);
            float expected = w.scale * (float)w.code;
            if (w.minima) expected += w.minimum;
            expect(found[n * inputs + i] == expected, "weight of a block", f->format, n, i, inputs);
        }
    free(found);
}

/* 1..17 rows of a layer of one part, in one call, against every output of every row */
static void block_layer(const file_format *f, int outputs, int inputs, int style) {
    size_t tiles = ((size_t)outputs + LS_TILE - 1) / LS_TILE;
    size_t row_bytes = (size_t)(inputs / f->inputs * f->bytes);
    uint8_t *raw = some_blocks(f, (size_t)(outputs * inputs / f->inputs), style);
    uint8_t *packed = need(tiles * ls_block_tile_bytes(f->format, inputs));
    int64_t *order = need(sizeof *order * (size_t)outputs);
    for (int n = 0; n < outputs; n++) order[n] = n;
    int sound = ls_pack_blocks(f->format, raw, order, outputs, inputs, packed, 2);
    expect(sound, "finite scale", f->format, outputs, inputs, style);
    ls_linear_part part = {f->format, outputs, packed};
    ls_linear l = {LS_BLOCKS, inputs, outputs, inputs, NULL, NULL, NULL, 1, &part};
    same_weights(f, raw, &part, inputs, order);
    float *x = floats((size_t)MOST_ROWS * inputs);
    for (int i = 0; style != RANDOM && i < MOST_ROWS * inputs; i++) x[i] = i / inputs % 2 ? 1 : -1;
    float *expected = need(sizeof(float) * (size_t)(MOST_ROWS * outputs));
    for (int row = 0; row < MOST_ROWS; row++)
        for (int n = 0; n < outputs; n++)
            expected[row * outputs + n] =
                block_sum(f, raw + (size_t)n * row_bytes, x + (size_t)row * inputs, inputs);
    for (int rows = 1; rows <= MOST_ROWS; rows++) {
        size_t bytes = sizeof(float) * (size_t)(rows * outputs);
        float *y = need(bytes), *some = copy(x, (size_t)(rows * inputs));
        forward(&l, some, rows, y, 1 + rows % 2);
        expect(memcmp(y, expected, bytes) == 0, "layer of blocks", f->format, outputs, inputs, rows);
        free(y), free(some);
    }
    free(raw), free(packed), free(order), free(x), free(expected);
}

static void blocks(void) {
    const int shapes[][2] = {{1, 1}, {31, 2}, {65, 3}};
    for (size_t k = 0; k < sizeof FILE_FORMATS / sizeof *FILE_FORMATS; k++)
        for (int style = RANDOM; style < STYLES; style++)
            for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
                block_layer(FILE_FORMATS + k, shapes[i][0], shapes[i][1] * FILE_FORMATS[k].inputs, style);
}
