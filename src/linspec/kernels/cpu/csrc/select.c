/* What judges the pages of a cache, and nodes select what they read by: see select.inc.h.
 *
 * It is of committed rows, and is made when a step needs it: what a slot has of it counts from its first row on, so that
 * whoever changes committed rows only has to lower that number. A prompt makes that of its own rows as well, which does
 * not count yet. */
#include "step.h"

int ls_any_selected(const ls_run *s, const ls_layer *l) {
    for (int head = 0; head < s->d->kv_heads; head++)
        if (l->part[l->part_of[head]].chosen) return 1;
    return 0;
}

void ls_keep_judge(const ls_run *s, const ls_layer *l, int input, int head) {
    const ls_step_input *in = s->b->input + input;
    const ls_mixer_part *p = l->part + l->part_of[head];
    if (!p->chosen) return;
    ls_mixer m = ls_mixer_of(s->d, l, in, head);
    int rows = m.coded ? LS_PAGE : LS_JUDGED, first = m.committed / rows, last = first;
    if (s->b->chained) last = (m.committed + m.staged) / rows;
    if (!s->b->chained || input == 0) {
        int32_t *judged = p->judged + (int64_t)in->slot * p->kv_heads + l->place[head];
        int committed = first;
        first = *judged;
        *judged = committed;
    }
    if (m.coded)
        ls_current()->code_pages(&m, first, last);
    else
        ls_current()->bound_pages(&m, first, last);
}
