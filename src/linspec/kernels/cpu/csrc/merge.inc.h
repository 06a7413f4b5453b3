/* Partial sums: what queries have read of some of their rows. Part of every isa_*.c.
 *
 * Those of a kv head are a sum [width, rounded up to 16] for every node and query head, then for each of these the
 * softmax behind it. Each block of rows is summed apart, and blocks are put together in the order of their positions:
 * one behind the other within a chunk, then chunk behind chunk. That fixes every rounding. Who computes which blocks,
 * and whether they meet at once or later, changes no bit. */

/* Put later rows behind those of one query. */
INLINE void merge_rows(const ls_mixer *m, float *sum, softmax_state *state, const float *more,
                       const softmax_state *later) {
    int width = ls_up16(m->width);
    vl keep = vl_set1(1.0f), scale = keep;
    if (!m->squared_relu) {
        if (later->sum == 0.0f) return; /* this query sees none of them */
        if (state->sum == 0.0f) {
            *state = *later;
            memcpy(sum, more, sizeof *sum * (size_t)width);
            return;
        }
        float max = state->max > later->max ? state->max : later->max;
        vl powers = vl_exp((vl){state->max - max, later->max - max});
        keep = vl_set1(powers[0]);
        scale = vl_set1(powers[1]);
        *state = (softmax_state){max, state->sum * powers[0] + later->sum * powers[1]};
    }
    for (int i = 0; i < width; i += LS_LANES)
        vl_store(sum + i, vl_load(sum + i) * keep + vl_load(more + i) * scale);
}

INLINE softmax_state *states_of(const ls_mixer *m, float *partial) {
    return (softmax_state *)(partial + ls_query_count(m) * (size_t)ls_up16(m->width));
}

/* see ls_ops */
static void merge_partials(const ls_mixer *m, float *partial, float *more) {
    softmax_state *state = states_of(m, partial), *later = states_of(m, more);
    size_t width = (size_t)ls_up16(m->width);
    for (size_t i = 0; i < ls_query_count(m); i++)
        merge_rows(m, partial + i * width, state + i, more + i * width, later + i);
}

static void empty_partial(const ls_mixer *m, float *partial) {
    size_t queries = ls_query_count(m);
    memset(partial, 0, sizeof *partial * queries * (size_t)ls_up16(m->width));
    for (size_t i = 0; i < queries; i++) states_of(m, partial)[i] = (softmax_state){-__builtin_inff(), 0.0f};
}
