/* Work on single rows: norms, codes, activations, caps. */

/* norm, then the codes of the row: what comes before an integer layer */
static void norm_and_codes(const float *x, const float *weight, int width) {
    int padded = (width + LS_GROUP - 1) / LS_GROUP * LS_GROUP, groups = padded / LS_GROUP;
    for (int each = 0; each < 2; each++) {
        float *rows[2], scales[2];
        int8_t *codes[2];
        int32_t *offsets[2];
        for (int i = 0; i < 2; i++) {
            const ls_ops *ops = i ? ls_current() : plain;
            rows[i] = normed(ops, x, weight, width);
            codes[i] = need((size_t)padded);
            offsets[i] = need(sizeof **offsets * (size_t)(each ? groups : 1));
            scales[i] = ops->quantize_row(rows[i], width, padded, 1, each, codes[i], offsets[i]);
        }
        int same = !memcmp(rows[0], rows[1], sizeof **rows * (size_t)width) &&
                   !memcmp(codes[0], codes[1], (size_t)padded) && scales[0] == scales[1] &&
                   !memcmp(offsets[0], offsets[1], sizeof **offsets * (size_t)(each ? groups : 1));
        expect(same, "norm and quantization", width, each, 0, 0);
        for (int i = 0; i < 2; i++) free(rows[i]), free(codes[i]), free(offsets[i]);
    }
}

/* f(x) of an activation, in double */
static double activation(int f, double x) {
    switch (f) {
        case LS_SILU: return x / (1 + exp(-x));
        case LS_GELU: return x * 0.5 * (1 + erf(x * sqrt(0.5)));
        case LS_GELU_TANH: return x * 0.5 * (1 + tanh(sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x)));
        default: return x > 0 ? x : 0;
    }
}

/* activations, gated and not, of numbers of all sizes; caps */
static void activations(int width) {
    size_t n = (size_t)width;
    float *x = floats(n), *up = floats(n), *y[2], *capped[2];
    for (int i = 0; i < width; i++) x[i] *= (float)(1 << i % 8) / 8;
    for (int f = LS_SILU; f <= LS_RELU; f++)
        for (int gated = 0; gated < 2; gated++) {
            int far = 0;
            for (int i = 0; i < 2; i++) {
                y[i] = need(n * sizeof(float));
                (i ? ls_current() : plain)->activate(f, x, gated ? up : NULL, width, y[i]);
            }
            for (int i = 0; i < width; i++) {
                double exact = activation(f, (double)x[i]) * (gated ? (double)up[i] : 1.0);
                far += fabs(exact - (double)y[1][i]) > 1e-6 * (1 + fabs((double)x[i]));
            }
            expect(!memcmp(y[0], y[1], n * sizeof(float)), "activation", width, f, gated, 0);
            expect(!far, "activation in double", width, f, gated, far);
            free(y[0]), free(y[1]);
        }
    for (int i = 0; i < 2; i++) {
        capped[i] = copy(x, n);
        (i ? ls_current() : plain)->cap(capped[i], 3.0f, width);
    }
    for (int i = 0; i < width; i++)
        expect(fabs(3 * tanh((double)x[i] / 3) - (double)capped[1][i]) < 1e-6, "cap in double", width, i, 0, 0);
    expect(!memcmp(capped[0], capped[1], n * sizeof(float)), "cap", width, 0, 0, 0);
    free(x), free(up), free(capped[0]), free(capped[1]);
}

static void layer_norms(const float *x, const float *weight, int width) {
    size_t n = (size_t)width;
    float *bias = floats(n), *y[2];
    double mean = 0, squares = 0;
    for (int i = 0; i < width; i++) mean += (double)x[i] / width;
    for (int i = 0; i < width; i++) squares += ((double)x[i] - mean) * ((double)x[i] - mean) / width;
    for (int biased = 0; biased < 2; biased++) {
        for (int i = 0; i < 2; i++) {
            y[i] = need(n * sizeof(float));
            (i ? ls_current() : plain)->layer_norm(x, weight, biased ? bias : NULL, 0.01f, width, y[i]);
        }
        int far = 0;
        for (int i = 0; i < width; i++) {
            double exact = ((double)x[i] - mean) / sqrt(squares + 0.01) * (double)weight[i];
            far += fabs(exact + (biased ? (double)bias[i] : 0) - (double)y[1][i]) > 1e-5;
        }
        expect(!memcmp(y[0], y[1], n * sizeof(float)) && !far, "layer norm", width, biased, far, 0);
        free(y[0]), free(y[1]);
    }
    free(bias);
}

static void rows_of_width(int width) {
    size_t bytes = sizeof(float) * (size_t)width;
    float *x = floats((size_t)width), *weight = floats((size_t)width), *normalize[2];
    norm_and_codes(x, weight, width);
    layer_norms(x, weight, width);
    activations(width);
    for (int i = 0; i < 2; i++) {
        normalize[i] = copy(x, (size_t)width);
        (i ? ls_current() : plain)->normalize(normalize[i], width);
    }
    expect(memcmp(normalize[0], normalize[1], bytes) == 0, "unit feature", width, 0, 0, 0);
    free(normalize[0]), free(normalize[1]), free(x), free(weight);
}
