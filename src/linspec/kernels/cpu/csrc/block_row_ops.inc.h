/* Rows of inputs for weights in blocks: a scale for every 32 codes, as a few large inputs are usual in
 * language models and would take all bits from the others. Part of every isa_*.c. */

/* 32 inputs; a group that holds a NaN or an infinity gets the scale NaN, so that it cannot pass
 * unnoticed */
INLINE void quantize_block(const float *x, int rows, int8_t *codes, int32_t *sums, float *scales) {
    const float zeros[LS_GROUP] = {0};
    float most = largest_size(x, LS_GROUP), scale = most / 127.0f;
    if (!__builtin_isfinite(most)) x = zeros, scale = __builtin_nanf("");
    float inverse = inverse_scale(most);
    int32_t first = quantize_half(x, inverse, rows, codes);
    int32_t second = quantize_half(x + LS_GROUP / 2, inverse, rows, codes + (size_t)rows * LS_GROUP / 2);
    sums[0] = -first, sums[rows] = -second, sums[2 * rows] = -(first + second);
    scales[0] = scale;
    scales[rows] = scale * (float)(first + second);
}

/* One row into a block of `rows` rows: see ls_block_rows. */
static void quantize_blocks(const float *x, int groups, int rows, int8_t *codes, int32_t *sums,
                            float *scales) {
    for (int g = 0; g < groups; g++)
        quantize_block(x + (size_t)g * LS_GROUP, rows, codes + (size_t)g * LS_GROUP * rows,
                       sums + (size_t)g * LS_BLOCK_SUMS * rows,
                       scales + (size_t)g * LS_BLOCK_SCALES * rows);
}
