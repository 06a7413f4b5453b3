/* The bounds of the pages of a cache, from which nodes select what they read: see select.inc.h.
 *
 * They are of committed rows, and are made when a step needs them: what a slot has of them counts from its first row on,
 * so that whoever changes committed rows only has to lower that number. A prompt makes those of its own rows as well,
 * which do not count yet. */
#include "step.h"

int ls_any_selected(const ls_run *s, const ls_layer *l) {
    for (int head = 0; head < s->d->kv_heads; head++)
        if (l->part[l->part_of[head]].chosen) return 1;
    return 0;
}

void ls_keep_bounds(const ls_run *s, const ls_layer *l, int input, int head) {
    const ls_step_input *in = s->b->input + input;
    const ls_mixer_part *p = l->part + l->part_of[head];
    if (!p->chosen) return;
    ls_mixer m = ls_mixer_of(s->d, l, in, head);
    int first = m.committed / LS_JUDGED, last = first;
    if (s->b->chained) last = (m.committed + m.staged) / LS_JUDGED;
    if (!s->b->chained || input == 0) {
        int32_t *bounded = p->bounded + (int64_t)in->slot * p->kv_heads + l->place[head];
        int committed = first;
        first = *bounded;
        *bounded = committed;
    }
    ls_current()->bound_pages(&m, first, last);
}
