/* One state of those of several layers of a target, for drafters that read them: norms, then a layer over all.
 *
 *     x = out_norm(W [norm_1(h_1); norm_2(h_2); ...]) */
#include <string.h>

#include "step.h"

void ls_fuse(const ls_fusion *f, const ls_run *s, const float *const *states, void *packed, int thread, int threads) {
    int rows = s->b->rows, width = s->d->width;
    int first = ls_share(rows, thread, threads), last = ls_share(rows, thread + 1, threads);
    ls_packed_rows to = ls_packed_at(f->layer, rows, packed);
    float *line = ls_scratch((size_t)f->layer->inputs * sizeof *line);
    for (int row = first; row < last; row++) {
        for (int i = 0; i < f->read; i++) {
            const float *from = states[(size_t)row * f->read + i];
            float *part = line + (size_t)i * width;
            if (f->norm) ls_apply_norm(f->norm[i], 0, from, s->d->eps, width, part);
            else memcpy(part, from, (size_t)width * sizeof *part);
        }
        ls_pack_rows(f->layer, &to, row, row + 1, line, 0);
    }
    ls_multiply(f->layer, &to, s->x, 0, thread, threads);
    for (int row = first; f->out_norm && row < last; row++) {
        float *x = s->x + (size_t)row * width;
        ls_apply_norm(f->out_norm, 0, x, s->d->eps, width, x);
    }
    ls_barrier(threads);
}
