/* Rows of inputs for weights in blocks: a scale for every 32 codes, as a few large inputs are usual in
 * language models and would take all bits from the others. Part of every isa_*.c. */

/* 32 inputs; a group that holds a NaN or an infinity gets the scale NaN, so that it cannot pass
 * unnoticed */
static void quantize_group(const float *x, int rows, int8_t *codes, int32_t *sums, float *scales) {
    vf low = vf_load(x), high = vf_load(x + 16);
    float most = vf_largest(vf_max(vf_abs(low), vf_abs(high)));
    float scale = most / 127.0f + vf_sum(low * vf_set1(0.0f) + high * vf_set1(0.0f));
    /* what is below 4e-37 has no inverse: it is zero */
    float factor = most > 0.0f ? 127.0f / most : 0.0f;
    if (!__builtin_isfinite(factor) || !__builtin_isfinite(scale)) factor = 0.0f;
    vi whole[2] = {{0}, {0}};
    if (factor > 0.0f) {
        whole[0] = vf_round(low * vf_set1(factor));
        whole[1] = vf_round(high * vf_set1(factor));
    }
    int32_t four[8], total = 0;
    for (int half = 0; half < 2; half++) {
        vb bytes = LS_NARROW(whole[half]);
        memcpy(four + 4 * half, &bytes, sizeof bytes);
        int32_t sum = vi_sum(whole[half]);
        sums[half * rows] = -sum;
        total += sum;
    }
    for (int q = 0; q < 8; q++) memcpy(codes + (size_t)q * rows * 4, four + q, 4);
    sums[2 * rows] = -total;
    scales[0] = scale;
    scales[rows] = scale * (float)total;
}

/* One row into a block of `rows` rows: see ls_block_rows. */
static void quantize_blocks(const float *x, int groups, int rows, int8_t *codes, int32_t *sums,
                            float *scales) {
    for (int g = 0; g < groups; g++)
        quantize_group(x + (size_t)g * LS_GROUP, rows, codes + (size_t)g * LS_GROUP * rows,
                       sums + (size_t)g * LS_BLOCK_SUMS * rows,
                       scales + (size_t)g * LS_BLOCK_SCALES * rows);
}
