/* Partial sums: what queries have read of some of their rows. Part of every isa_*.c.
 *
 * Those of a kv head are a sum [width, rounded up to 16] for every node and query head, then for each of these the
 * softmax behind it. Each block of rows is summed apart, and blocks are put together in the order of their positions:
 * one behind the other within a chunk, then chunk behind chunk. That fixes every rounding. Who computes which blocks,
 * and whether they meet at once or later, changes no bit. */

/* How the sum of later rows comes to that of those before, as in an accumulator; NOTHING: the query sees none of them */
enum { NOTHING = -1 };
typedef struct {
    int how;
    float keep, scale;
} joint;

/* The softmax of one query with that of later rows. */
INLINE joint join_states(const ls_mixer *m, softmax_state *state, const softmax_state *later) {
    if (m->squared_relu) return (joint){JOIN, 1.0f, 1.0f};
    if (later->sum == 0.0f) return (joint){NOTHING, 1.0f, 0.0f};
    if (state->sum == 0.0f) {
        *state = *later;
        return (joint){BEGIN, 0.0f, 1.0f};
    }
    float max = state->max > later->max ? state->max : later->max;
    vl powers = vl_exp((vl){state->max - max, later->max - max});
    *state = (softmax_state){max, state->sum * powers[0] + later->sum * powers[1]};
    return (joint){JOIN, powers[0], powers[1]};
}

/* and their sums, as `accumulate` does it */
INLINE void join_rows(const ls_mixer *m, float *sum, const float *more, joint to) {
    if (to.how == NOTHING) return;
    for (int i = 0; i < ls_up16(m->width); i += LS_LANES)
        vl_store(sum + i, to.how == BEGIN ? vl_load(more + i)
                                          : vl_load(sum + i) * vl_set1(to.keep) + vl_load(more + i) * vl_set1(to.scale));
}

INLINE softmax_state *states_of(const ls_mixer *m, float *partial) {
    return (softmax_state *)(partial + ls_query_count(m) * (size_t)ls_up16(m->width));
}

/* see ls_ops */
static void merge_partials(const ls_mixer *m, float *partial, float *more) {
    softmax_state *state = states_of(m, partial), *later = states_of(m, more);
    size_t width = (size_t)ls_up16(m->width);
    for (size_t i = 0; i < ls_query_count(m); i++)
        join_rows(m, partial + i * width, more + i * width, join_states(m, state + i, later + i));
}

static void empty_partial(const ls_mixer *m, float *partial) {
    size_t queries = ls_query_count(m);
    memset(partial, 0, sizeof *partial * queries * (size_t)ls_up16(m->width));
    for (size_t i = 0; i < queries; i++) states_of(m, partial)[i] = (softmax_state){-__builtin_inff(), 0.0f};
}
