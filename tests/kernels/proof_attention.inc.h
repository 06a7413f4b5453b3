/* Mixers over a cache: every kind of row, trees, windows and groups. Part of proof.c. */

enum { NODES = 5, BASE = LS_CHUNK + 46, QUERY_HEADS = 6, KV = 2, TAPS = 3, HISTORY = TAPS - 1 };
static const uint64_t tree[NODES] = {1, 3, 5, 11, 21};
static const int row_kinds[] = {LS_F32, LS_BF16, LS_F16, LS_INT8};

static int row_bytes(int kind, int width) {
    if (kind == LS_INT4) return (width + LS_GROUP - 1) / LS_GROUP * (LS_GROUP / 2 + 4);
    return kind == LS_INT8 ? (width + 3) / 4 * 4 + 4 : kind == LS_F32 ? 4 * width : 2 * width;
}

/* `count` rows in memory that ends where they end */
static char *some_rows(int kind, int width, size_t count, int style) {
    size_t bytes = (size_t)row_bytes(kind, width);
    char *rows = need(count * bytes);
    float *x = floats((size_t)width);
    for (size_t i = 0; i < count; i++) {
        for (int c = 0; c < width; c++)
            x[c] = style == RANDOM ? ((float)next() / (1 << 23) - 1) * (next() % 5 ? 1.0f : 1e-3f)
                                   : (style == LOWEST ? -1.0f : 1.0f) * (i % 3 ? 1.0f : -1.0f);
        if (kind == LS_F32) memcpy(rows + i * bytes, x, bytes);
        if (kind == LS_BF16 || kind == LS_F16) {
            uint16_t *half = need(bytes);
            plain->narrow_row(x, width, kind, half);
            memcpy(rows + i * bytes, half, bytes);
            free(half);
        }
        if (kind == LS_INT4) plain->pack_nibbles(x, width, (uint8_t *)(rows + i * bytes));
        if (kind != LS_INT8) continue;
        float scale = 0.01f + (float)(next() % 100) / 1000;
        memset(rows + i * bytes, 0, bytes);
        for (int c = 0; c < width; c++) rows[i * bytes + (size_t)c] = (char)(int)(x[c] * 127);
        memcpy(rows + (i + 1) * bytes - sizeof scale, &scale, sizeof scale);
    }
    free(x);
    return rows;
}

/* a mixer over rows that are its own, and the queries of its nodes */
typedef struct {
    ls_mixer m;
    char *keys, *values;
    float *sums, *conv_weights, *q;
} case_of;

static case_of make_case(int kind, int width, int squared_relu, int group, int window, int taps, int style) {
    int64_t rows = BASE + NODES;
    int bytes = row_bytes(kind, width);
    case_of c = {.keys = some_rows(kind, width, (size_t)(KV * rows), style),
                 .values = some_rows(kind, width, (size_t)(KV * (HISTORY + rows)), style),
                 .sums = floats((size_t)(KV * width * width)), .conv_weights = floats(QUERY_HEADS * TAPS),
                 .q = floats((size_t)(NODES * QUERY_HEADS * width))};
    c.m = (ls_mixer){.heads = QUERY_HEADS, .kv_heads = KV, .width = width, .committed = BASE, .staged = NODES,
                     .nodes = NODES, .window = window, .group = group, .span = 2, .squared_relu = squared_relu,
                     .score_factor = 1, .score_scale = 1 / sqrtf((float)width), .taps = taps, .alpha = 0.5f, .conv_weights = c.conv_weights, .row_kind = kind,
                     .row_bytes = bytes, .value_bytes = bytes, .key_stride = rows * bytes, .value_stride = (HISTORY + rows) * bytes,
                     .keys = c.keys, .values = c.values + HISTORY * bytes, .sums = group ? c.sums : NULL,
                     .ancestors = tree};
    return c;
}

static void free_case(case_of *c) {
    free(c->keys), free(c->values), free(c->sums), free(c->conv_weights), free(c->q);
}

/* the blocks `first`.. of a chunk put into `sum`, in pieces of `most` at most; apart: LS_CHUNK_BLOCKS partial sums */
static void chunk_in_pieces(const ls_ops *ops, const ls_mixer *m, int head, int first, int most, const float *q,
                            float *sum, float *apart, void *scratch) {
    int stride = m->heads * m->width, end = first + LS_CHUNK_BLOCKS, count;
    if (end > ls_block_count(m)) end = ls_block_count(m);
    for (int at = first; at < end; at += count) {
        count = end - at < most ? end - at : most;
        ops->attend(m, head, at, count, at != first, q, stride, at == first ? sum : apart, scratch);
        for (int i = 0; at != first && i < count; i++) ops->merge(m, sum, apart + (size_t)i * ls_partial_floats(m));
    }
}

/* the outputs of all nodes: [nodes][heads][width] */
static float *attended_in_pieces(const ls_ops *ops, const ls_mixer *m, const float *q, int most) {
    int stride = m->heads * m->width;
    size_t part = ls_partial_floats(m);
    float *sum = need(part * sizeof *sum), *chunk = need(part * sizeof *chunk);
    float *apart = need(LS_CHUNK_BLOCKS * part * sizeof *apart), *out = need((size_t)(m->nodes * stride) * sizeof *out);
    void *scratch = need(ls_attend_scratch_bytes(m));
    for (int head = 0; head < m->kv_heads; head++) {
        for (int first = 0; first < ls_block_count(m); first += LS_CHUNK_BLOCKS) {
            chunk_in_pieces(ops, m, head, first, most, q, first ? chunk : sum, apart, scratch);
            if (first) ops->merge(m, sum, chunk);
        }
        ops->end_attention(m, head, q, stride, sum, out, stride, scratch);
    }
    free(sum), free(chunk), free(apart), free(scratch);
    return out;
}

static float *attended(const ls_ops *ops, const ls_mixer *m, const float *q) {
    return attended_in_pieces(ops, m, q, LS_CHUNK_BLOCKS);
}

/* what a mixer reads, over a chunk of its rows and a little more */
static void mixer(int kind, int width, int squared_relu, int group, int window, int style) {
    case_of c = make_case(kind, width, squared_relu, group, window, TAPS, style);
    float *out[2] = {attended(plain, &c.m, c.q), attended(ls_current(), &c.m, c.q)};
    size_t bytes = sizeof(float) * (size_t)(NODES * QUERY_HEADS * width);
    expect(memcmp(out[0], out[1], bytes) == 0, "mixer", kind, width, squared_relu, group ? group : window);
    const int pieces[] = {1, 5, 11};
    for (int i = 0; i < 3; i++) {
        float *cut = attended_in_pieces(ls_current(), &c.m, c.q, pieces[i]);
        expect(memcmp(out[1], cut, bytes) == 0, "mixer in pieces", kind, width, squared_relu, pieces[i]);
        free(cut);
    }
    free(out[0]), free(out[1]);
    free_case(&c);
}

/* the first rows of a kv head as sinks lie that have left */
static char *sinks_of(const ls_mixer *m, int sinks) {
    size_t bytes = (size_t)sinks * (size_t)m->row_bytes;
    char *rows = need(2 * bytes);
    memcpy(rows, m->keys, bytes);
    memcpy(rows + bytes, m->values, bytes);
    return rows;
}

/* sinks as the first rows (0) or beside them (1), of a whole block and more too; and a cap on the scores */
static void sinks_and_cap(int kind, int width, int apart, int sinks) {
    case_of c = make_case(kind, width, 0, 16, 0, TAPS, RANDOM);
    char *rows = sinks_of(&c.m, sinks);
    c.m.sums = NULL;
    c.m.sinks = sinks;
    c.m.sink_rows = apart ? rows : NULL;
    c.m.score_cap = 1.5f;
    float *out[2] = {attended(plain, &c.m, c.q), attended(ls_current(), &c.m, c.q)};
    size_t bytes = sizeof(float) * (size_t)(NODES * QUERY_HEADS * width);
    expect(memcmp(out[0], out[1], bytes) == 0, "mixer with sinks", kind, width, apart, sinks);
    free(out[0]), free(out[1]), free(rows);
    free_case(&c);
}

/* Sinks weigh the same, to the bit, once their rows have left with the first groups. */
static void sinks_that_leave(int kind, int width, int sinks) {
    enum { LEFT = 64 };
    case_of c = make_case(kind, width, 0, 16, 0, TAPS, RANDOM);
    size_t each = (size_t)(QUERY_HEADS * width), head = each / KV * sizeof(float);
    char *rows = sinks_of(&c.m, sinks);
    c.m.sums = NULL;
    c.m.sinks = sinks;
    float *before = attended(ls_current(), &c.m, c.q);
    c.m.committed -= LEFT;
    c.m.keys += LEFT * c.m.row_bytes;
    c.m.values += LEFT * c.m.row_bytes;
    c.m.sink_rows = rows;
    float *after = attended(ls_current(), &c.m, c.q);
    for (int node = 0; node < NODES; node++)
        expect(!memcmp(before + node * each, after + node * each, head), "sinks that left", kind, width, sinks, node);
    free(before), free(after), free(rows);
    free_case(&c);
}

static char *copy_of(const char *from, int64_t bytes) { return memcpy(need((size_t)bytes), from, (size_t)bytes); }

/* The first rows in pages, each in memory of its own, give the bits of rows in one buffer. */
static void rows_in_pages(int kind, int width, int pages) {
    case_of c = make_case(kind, width, 0, 0, 0, TAPS, RANDOM);
    c.m.heads /= KV, c.m.kv_heads = 1;
    int64_t row = c.m.row_bytes, page = LS_PAGE * row, rest = (BASE + NODES) * row - pages * page, ahead = HISTORY * row;
    float *together = attended(ls_current(), &c.m, c.q);
    const char **list = need((size_t)pages * sizeof *list);
    for (int i = 0; i < pages; i++) {
        char *both = need((size_t)(2 * page));
        memcpy(both, c.m.keys + i * page, (size_t)page);
        memcpy(both + page, c.m.values + i * page, (size_t)page);
        list[i] = both;
    }
    char *keys = copy_of(c.m.keys + pages * page, rest), *values = need((size_t)(ahead + rest));
    memcpy(values, c.m.values - ahead, (size_t)ahead);
    memcpy(values + ahead, c.m.values + pages * page, (size_t)rest);
    c.m.paged = pages * LS_PAGE, c.m.pages = list, c.m.page_keys = 0, c.m.page_values = page;
    c.m.keys = keys, c.m.values = values + ahead;
    float *apart = attended(ls_current(), &c.m, c.q);
    size_t bytes = sizeof(float) * (size_t)(NODES * c.m.heads * width);
    expect(memcmp(together, apart, bytes) == 0, "rows in pages", kind, width, pages, 0);
    for (int i = 0; i < pages; i++) free((char *)list[i]);
    free(list), free(keys), free(values), free(together), free(apart);
    free_case(&c);
}

static double feature_of(const ls_mixer *m, const char *row, int c) {
    float f, scale;
    uint16_t half;
    switch (m->row_kind) {
        case LS_F32: memcpy(&f, row + 4 * c, sizeof f); return (double)f;
        case LS_BF16: return (double)from_bf16(row + 2 * c);
        case LS_INT8:
            memcpy(&scale, row + m->row_bytes - 4, sizeof scale);
            return (double)(signed char)row[c] * (double)scale;
    }
    memcpy(&half, row + 2 * c, sizeof half);
    int exponent = half >> 10 & 31, fraction = half & 1023;
    double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return half & 0x8000 ? -size : size;
}

/* the same in double, for one node and head: weights of the rows that it sees, then their values */
static void exact_attention(const ls_mixer *m, const double *q, int node, int head, double *out) {
    double weights[BASE + NODES], most = -INFINITY, total = 0;
    int rows[BASE + NODES], count = 0, kv = head / (QUERY_HEADS / KV);
    for (int i = 0; i < m->committed; i++) rows[count++] = i;
    for (int i = 0; i < m->staged; i++)
        if (m->ancestors[node] >> i & 1) rows[count++] = m->committed + i;
    int first = m->window && count > m->window ? count - (int)m->window : 0;
    for (int i = first; i < count; i++) {
        const char *key = m->keys + kv * m->key_stride + (int64_t)rows[i] * m->row_bytes;
        weights[i] = 0;
        for (int c = 0; c < m->width; c++) weights[i] += q[c] * feature_of(m, key, c);
        if (!m->squared_relu) weights[i] *= (double)m->score_scale;
        if (m->score_cap > 0 && !m->squared_relu)
            weights[i] = (double)m->score_cap * tanh(weights[i] / (double)m->score_cap);
        most = fmax(most, weights[i]);
    }
    for (int i = first; i < count; i++) {
        double positive = fmax(weights[i], 0);
        weights[i] = m->squared_relu ? positive * positive : exp(weights[i] - most);
        total += weights[i];
    }
    for (int c = 0; c < m->width; c++) out[c] = 0;
    for (int i = first; i < count; i++) {
        const char *value = m->values + kv * m->value_stride + (int64_t)rows[i] * m->row_bytes;
        for (int c = 0; c < m->width; c++)
            out[c] += weights[i] / (m->squared_relu ? 1 : total) * feature_of(m, value, c);
    }
}

/* a query as it meets keys */
static void meets(const ls_mixer *m, const float *q, double *to) {
    int padded = (m->width + 31) / 32 * 32;
    int8_t *codes = need((size_t)padded);
    int32_t offset;
    float scale = plain->quantize_row(q, m->width, padded, 1, 0, codes, &offset);
    for (int c = 0; c < m->width; c++)
        to[c] = m->row_kind == LS_INT8 ? (double)codes[c] * (double)scale : (double)q[c];
    free(codes);
}

/* Nodes that overwrite see all rows, none of them staged: see `near_double`. */
enum { OVERWRITES = STYLES };

static void near_double(int kind, int width, int squared_relu, int window, float cap, int style) {
    case_of c = make_case(kind, width, squared_relu, 0, window, 0, style == OVERWRITES ? RANDOM : style);
    c.m.score_cap = cap;
    if (style == OVERWRITES) c.m.committed += NODES, c.m.staged = 0, c.m.ancestors = NULL;
    float *out = attended(ls_current(), &c.m, c.q);
    double *q = need(sizeof *q * (size_t)width), *exact = need(sizeof *exact * (size_t)width);
    int far = 0;
    for (int i = 0; i < NODES * QUERY_HEADS; i++) {
        meets(&c.m, c.q + i * width, q);
        exact_attention(&c.m, q, i / QUERY_HEADS, i % QUERY_HEADS, exact);
        for (int f = 0; f < width; f++) {
            double limit = (1 + fabs(exact[f])) * (squared_relu ? 2e-3 : kind == LS_F32 ? 2e-6 : 2e-5);
            far += !(fabs(exact[f] - (double)out[i * width + f]) < limit);
        }
    }
    expect(far == 0, "attention in double", kind, width, squared_relu, window);
    free(out), free(q), free(exact);
    free_case(&c);
}

/* A node gets the same bits alone, and after its root has been committed. */
static void nodes_apart(int kind, int width, int window) {
    case_of c = make_case(kind, width, 0, 0, window, TAPS, RANDOM);
    size_t each = (size_t)(QUERY_HEADS * width);
    float *together = attended(ls_current(), &c.m, c.q);
    for (int node = 0; node < NODES; node++) {
        ls_mixer alone = c.m;
        alone.nodes = 1;
        alone.staged = node + 1;
        float *out = attended(ls_current(), &alone, c.q + node * each);
        expect(!memcmp(out, together + node * each, each * sizeof *out), "a node alone", kind, width, window, node);
        free(out);
    }
    uint64_t shifted[NODES - 1];
    for (int i = 1; i < NODES; i++) shifted[i - 1] = tree[i] >> 1;
    ls_mixer later = c.m;
    later.committed++, later.staged--, later.nodes--;
    later.ancestors = shifted;
    float *out = attended(ls_current(), &later, c.q + each);
    expect(!memcmp(out, together + each, (NODES - 1) * each * sizeof *out), "committed root", kind, width, window, 0);
    free(out), free(together);
    free_case(&c);
}

/* Nodes that overwrite get the bits of plain C, and those that the last of them would get behind all others. */
static void overwriting(int kind, int width) {
    case_of c = make_case(kind, width, 0, 0, 0, 0, RANDOM);
    size_t each = (size_t)(QUERY_HEADS * width), last = (NODES - 1) * each;
    uint64_t one = 1;
    ls_mixer all = c.m, behind = c.m;
    all.committed += NODES, all.staged = 0, all.ancestors = NULL;
    behind.committed += NODES - 1, behind.staged = behind.nodes = 1, behind.ancestors = &one;
    float *out[3] = {attended(plain, &all, c.q), attended(ls_current(), &all, c.q),
                     attended(ls_current(), &behind, c.q + last)};
    expect(!memcmp(out[0], out[1], NODES * each * sizeof **out), "nodes that overwrite", kind, width, 0, 0);
    expect(!memcmp(out[1] + last, out[2], each * sizeof **out), "the last row", kind, width, 0, 0);
    free(out[0]), free(out[1]), free(out[2]);
    free_case(&c);
}

/* A NaN in a row or in a query reaches those that see it, and nobody else. */
static void nan_stays(int kind, int width) {
    case_of c = make_case(kind, width, 0, 0, 0, 0, RANDOM);
    size_t each = (size_t)(QUERY_HEADS * width);
    float *before = attended(ls_current(), &c.m, c.q);
    enum { ROW = 2, QUERY = 1 };
    float nan = NAN;
    uint16_t half = 0x7fff;
    for (int head = 0; head < KV; head++) {
        char *value = c.values + head * c.m.value_stride + (HISTORY + BASE + ROW) * (int64_t)c.m.row_bytes;
        memcpy(kind == LS_INT8 ? value + c.m.row_bytes - 4 : value, &nan, kind == LS_INT8 || kind == LS_F32 ? 4 : 0);
        memcpy(value, &half, kind == LS_BF16 || kind == LS_F16 ? 2 : 0);
    }
    c.q[QUERY * each] = NAN;
    float *after = attended(ls_current(), &c.m, c.q);
    for (int node = 0; node < NODES; node++) {
        int hit = (tree[node] >> ROW & 1) || node == QUERY;
        int same = !memcmp(before + node * each, after + node * each, each * sizeof *after);
        expect(hit ? isnan(after[node * each]) : same, "a NaN", kind, width, node, 0);
    }
    free(before), free(after);
    free_case(&c);
}

static void kinds_of_rows(int width) {
    for (size_t i = 0; i < sizeof row_kinds / sizeof *row_kinds; i++) {
        int kind = row_kinds[i];
        for (int style = RANDOM; style < STYLES; style++) {
            mixer(kind, width, 0, 0, 0, style);
            near_double(kind, width, 0, style == RANDOM ? 0 : 9, 0, style);
        }
        mixer(kind, width, 0, 0, 9, RANDOM);
        near_double(kind, width, 0, 9, 0, RANDOM);
        near_double(kind, width, 0, 9, 0.5f, RANDOM);
        for (int sinks = 3; sinks < 200; sinks += 130)
            for (int apart = 0; apart < 2; apart++) sinks_and_cap(kind, width, apart, sinks);
        near_double(kind, width, 0, 0, 0, OVERWRITES);
        overwriting(kind, width);
        for (int pages = 1; pages <= BASE / LS_PAGE; pages += 2) rows_in_pages(kind, width, pages);
        nodes_apart(kind, width, 0);
        nodes_apart(kind, width, 70);
        nan_stays(kind, width);
        sinks_that_leave(kind, width, 3);
    }
    near_double(LS_F32, width, 1, 0, 0, RANDOM);
    near_double(LS_F32, width, 1, 0, 0.5f, RANDOM);
}

/* 16-bit floats: the nearest there is, for floats of every size and for those half-way between two */
static void narrow(void) {
    uint32_t bits[96];
    float x[96], back;
    uint16_t found[2][96];
    for (int round = 0; round < 1000; round++) {
        for (int i = 0; i < 96; i++) {
            bits[i] = next() << 8 ^ next();
            if (i % 3 == 1) bits[i] = (bits[i] & 0xffffe000u) | 0x1000u;
            if (i % 3 == 2) bits[i] = (bits[i] & 0x807fffffu) | (100 + next() % 44) << 23;
            memcpy(x + i, bits + i, 4);
        }
        for (int kind = LS_BF16; kind <= LS_F16; kind += LS_F16 - LS_BF16) {
            plain->narrow_row(x, 95, kind, found[0]);
            ls_current()->narrow_row(x, 95, kind, found[1]);
            expect(!memcmp(found[0], found[1], 95 * 2), "16-bit floats", kind, round, 0, 0);
        }
        ls_mixer half = {.row_kind = LS_F16};
        for (int i = 0; i < 95; i++) {
            double exact = (double)x[i], unit = ldexp(1, isnormal(x[i]) ? ilogb(exact) - 10 : -24);
            double nearest = unit < ldexp(1, -24) ? rint(ldexp(exact, 24)) / ldexp(1, 24) : rint(exact / unit) * unit;
            int beyond = fabs(nearest) > 65504, sign = (bits[i] >> 31) << 15;
            int same = isnan(x[i]) ? (found[1][i] & 0x7fff) > 0x7c00
                       : beyond    ? found[1][i] == (0x7c00 | sign)
                                   : feature_of(&half, (const char *)(found[1] + i), 0) == nearest;
            expect(same, "float16", (int)bits[i], found[1][i], i, 0);
        }
        plain->narrow_row(x, 95, LS_BF16, found[0]);
        for (int i = 0; i < 95; i++) {
            back = from_bf16(found[0] + i);
            uint32_t up, down = bits[i] & 0xffff0000u;
            float below, above;
            up = down + 0x10000u;
            memcpy(&below, &down, 4), memcpy(&above, &up, 4);
            double rest = fabs((double)x[i] - (double)below), other = fabs((double)above - (double)x[i]);
            int wants_up = rest > other || (rest == other && (down >> 16 & 1));
            int same = isnan(x[i]) ? isnan(back) : !isfinite(above) || back == (wants_up ? above : below);
            expect(same, "bfloat16", (int)bits[i], found[0][i], i, 0);
        }
    }
}

static void mixers(void) {
    const int widths[] = {2, 24, 63, 64, 128};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        kinds_of_rows(widths[i]);
        for (int squared_relu = 0; squared_relu < 2; squared_relu++) {
            fold(widths[i], squared_relu);
            mixer(LS_F32, widths[i], squared_relu, 16, 0, RANDOM);
            mixer(LS_F32, widths[i], squared_relu, 0, 9, RANDOM);
            mixer(LS_F32, widths[i], squared_relu, 0, 0, RANDOM);
        }
    }
    narrow();
}
