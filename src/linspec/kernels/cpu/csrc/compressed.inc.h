/* Closed groups that become a few rows each, mixtures of theirs, under one softmax with the rows within the span. Part of
 * every isa_*.c.
 *
 * A kept row is a key, a value, and a 1 where there is one. Groups that close on the path to a node are made into rows
 * for it, from the rows of that path, as they will be when they close for good. */

INLINE int kept_columns(const ls_mixer *m) { return 2 * m->width + 1; }

/* to [kept_rows]: mixtures of the rows of a group, which begin at keys and values or are those of `indices` */
static void compress_group(const ls_mixer *m, const char *keys, const char *values, const int32_t *indices, float *to) {
    const ls_summed *f = m->form;
    int width = m->width, group = (int)m->group, columns = kept_columns(m);
    source from[2] = {{.rows = keys, .indices = indices, .stride = m->row_bytes, .kind = LS_F32, .count = group, .width = width},
                      {.rows = values, .indices = indices, .stride = m->value_bytes, .kind = LS_F32, .count = group, .width = width}};
    const float *maps[2] = {f->row_keys, f->row_values};
    memset(to, 0, sizeof *to * (size_t)(f->kept_rows * columns));
    for (int part = 0; part < 2; part++)
        for (int row = 0, n; row < f->kept_rows; row += n) {
            accumulator sums[MAX_ACCUMULATORS] = {{0}};
            n = f->kept_rows - row < MAX_ACCUMULATORS ? f->kept_rows - row : MAX_ACCUMULATORS;
            for (int i = 0; i < n; i++)
                sums[i] = (accumulator){to + (row + i) * columns + part * width, maps[part] + (row + i) * group,
                                        ADD, 0, 0};
            accumulate(from + part, sums, n);
        }
    for (int row = 0; row < f->kept_rows; row++) to[row * columns + 2 * width] = 1.0f;
}

/* see fold_summed: the oldest groups make room */
static void fold_compressed(const ls_mixer *m, int first, int last, float *sums) {
    size_t one = (size_t)(m->form->kept_rows * kept_columns(m)), others = (size_t)(m->form->kept_groups - 1) * one;
    for (int64_t row = first; row < last; row += m->group) {
        memmove(sums, sums + one, others * sizeof *sums);
        compress_group(m, m->keys + row * m->row_bytes, m->values + row * m->value_bytes, NULL, sums + others);
    }
}

/* The rows that a node sees, in three places: kept ones, those made for it, its own within the span. */
typedef struct {
    source values[3];
    const char *keys[3];
    int64_t key_strides[3];
} row_places;

static void read_places(const ls_mixer *m, const row_places *rows, const float *q, float *weights, float *out) {
    int count = 0;
    for (int part = 0; part < 3; part++)
        for (int i = 0; i < rows->values[part].count; i++) {
            int row = rows->values[part].indices[i];
            const float *key = (const float *)(rows->keys[part] + row * rows->key_strides[part]);
            weights[count++] = dot_row(q, key, m->width) * m->score_scale;
        }
    if (m->score_cap > 0.0f) cap_row(weights, m->score_cap, count);
    softmax_row(weights, 1.0f, count, weights);
    memset(out, 0, sizeof *out * (size_t)m->width);
    accumulator to = {out, weights, ADD, 0, 0};
    for (int part = 0; part < 3; to.weights += rows->values[part++].count) accumulate(&rows->values[part], &to, 1);
}

/* Indices of rows `from` on that are there of `groups` groups, of which those before `first` are forgotten and those
 * behind `last` are not seen; returns how many. */
static int list_kept(const ls_mixer *m, const float *rows, int number, int groups, int first, int last, int32_t *to) {
    int count = 0;
    for (int g = 0; g < groups; g++)
        for (int i = g * m->form->kept_rows; i < (g + 1) * m->form->kept_rows; i++)
            if (number + g >= first && number + g <= last && rows[(int64_t)i * kept_columns(m) + 2 * m->width] > 0.0f)
                to[count++] = i;
    return count;
}

/* scratch: ls_compressed_scratch_bytes */
static void read_compressed(const ls_mixer *m, const float *q, int64_t q_stride, float *out, int64_t out_stride,
                            float *scratch) {
    int repeats = m->heads / m->kv_heads, made = m->form->kept_rows, kept = m->form->kept_groups;
    int group = (int)m->group, most = m->committed + m->staged - m->summed, groups = most / group + 1;
    int columns = kept_columns(m), base = m->summed / group;
    int32_t *paths = (int32_t *)(scratch + (size_t)groups * (size_t)(made * columns)), *indices = paths + groups * group;
    float *weights = (float *)(indices + most + (groups + kept) * made);
    int64_t stride = (int64_t)sizeof(float) * columns;
    for (int i = 0; i < groups * group; i++) paths[i] = -1;
    for (int n = 0; n < m->nodes; n++) {
        visible_rows v;
        find_visible(m, n, &v);
        int newest = (v.count - 1) / group - (int)m->span, oldest = newest - kept + 1;
        for (int g = 0; base + g <= newest; g++) {
            int changed = 0, *path = paths + g * group;
            for (int i = 0; i < group; i++) {
                int row = row_at(m, &v, (base + g) * group + i);
                changed |= row != path[i];
                path[i] = row;
            }
            if (changed) compress_group(m, m->keys, m->values, path, scratch + (size_t)g * (size_t)(made * columns));
        }
        int closed = newest >= base ? newest - base + 1 : 0;
        int old = list_kept(m, m->sums, base - kept, kept, oldest, newest, indices);
        int new = list_kept(m, scratch, base, closed, oldest, newest, indices + old);
        int first = v.first > m->summed ? v.first : m->summed, own = v.count - first;
        for (int i = 0; i < own; i++) indices[old + new + i] = row_at(m, &v, first + i);
        row_places rows = {
            {{.rows = m->sums + m->width, .indices = indices, .stride = stride, .count = old, .width = m->width},
             {.rows = scratch + m->width, .indices = indices + old, .stride = stride, .count = new, .width = m->width},
             {.rows = m->values, .indices = indices + old + new, .stride = m->value_bytes, .count = own, .width = m->width}},
            {(const char *)m->sums, (const char *)scratch, m->keys}, {stride, stride, m->row_bytes}};
        for (int r = 0; r < repeats; r++)
            read_places(m, &rows, q + n * q_stride + r * m->width, weights, out + n * out_stride + r * m->width);
    }
}
