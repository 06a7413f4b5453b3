/* The greatest of many numbers, and where the lists of what nodes selected are: see positions.inc.h. */
#include "step.h"

/* whole numbers in the order of floats, both zeros being one */
static uint32_t in_order(float x) {
    uint32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

int32_t ls_greatest(const float *x, int count, int most, int32_t *to) {
    uint32_t least = 0;
    int found = 0, missing = most;
    for (int i = 0; count <= most && i < count; i++) to[i] = i;
    if (count <= most) return count;
    /* the least number that is among them, byte by byte; `missing`: how many are wanted of those that begin like it */
    for (int shift = 24; shift >= 0; shift -= 8) {
        int32_t begins[256] = {0}, byte = 255;
        for (int i = 0; i < count; i++) {
            uint32_t number = in_order(x[i]);
            begins[number >> shift & 255] += shift == 24 || (number ^ least) >> (shift + 8) == 0;
        }
        for (; begins[byte] < missing; byte--) missing -= begins[byte];
        least |= (uint32_t)byte << shift;
    }
    for (int i = 0; found < most; i++) {
        uint32_t number = in_order(x[i]);
        if (number < least || (number == least && missing-- <= 0)) continue;
        to[found++] = i;
    }
    return found;
}

int64_t ls_list_numbers(const ls_decoder *d, const ls_batch *b) {
    int64_t most = 0;
    for (int i = 0; i < d->layers; i++)
        for (int head = 0; head < d->kv_heads; head++) {
            const ls_mixer_part *p = d->layer[i].part + d->layer[i].part_of[head];
            for (int k = 0; p->positions && k < b->inputs; k++) {
                int64_t rows = (int64_t)b->input[k].committed[p->state] + b->input[k].staged;
                if (rows > p->positions) rows = p->positions;
                if (rows + 1 > most) most = rows + 1;
            }
        }
    return most;
}

void ls_place_lists(const ls_run *s, const ls_step_input *in, int head, ls_mixer *m) {
    int64_t each = s->list_numbers;
    if (!m->positions) return;
    m->list_stride = each * s->d->kv_heads;
    m->lists = s->lists + in->first * m->list_stride + head * each;
}
