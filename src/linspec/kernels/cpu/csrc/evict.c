/* Groups that close in a state: which of their rows stay, head by head, as nodes of a step have it (evicting.inc.h). */
#include "kernels.h"

static void evict_body(void *context, int thread, int threads) {
    const ls_eviction *e = context;
    int64_t keys = (int64_t)e->rows * (e->repeats + 1) * e->width, values = (int64_t)e->rows * e->width;
    int32_t bytes = (int32_t)sizeof(float) * e->width;
    ls_mixer m = {.heads = e->repeats, .kv_heads = 1, .width = e->width, .group = e->group,
                  .score_scale = e->score_factor / __builtin_sqrtf((float)e->width), .score_cap = e->score_cap, .row_kind = LS_F32, .row_bytes = (e->repeats + 1) * bytes,
                  .value_bytes = bytes, .budget = e->budget, .asked = e->asked, .pool = e->pool};
    for (ls_pieces p = ls_pieces_of(e->heads, 1, thread, threads); ls_take(&p);)
        for (int head = p.first; head < p.last; head++) {
            m.keys = (const char *)(e->keys + head * keys);
            m.values = (const char *)(e->values + head * values);
            ls_current()->close_groups(&m, 0, e->rows, e->kept + (size_t)head * ls_kept_floats(&m),
                                       ls_scratch(ls_close_floats(&m) * sizeof(float)));
        }
}

/* Close the groups of `rows` rows, in place. */
LS_API void ls_evict(const ls_eviction *e, int32_t threads) {
    ls_parallel(evict_body, (void *)(uintptr_t)e, threads, LS_SPIN_LAYER);
}
