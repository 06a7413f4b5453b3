/* What `linspec bench kernels` asks for: the time of a product without the calls around it, and of the
 * clock that its cycles are counted by. */
#include <time.h>

#include "kernels.h"

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* The least nanoseconds of `repeats` products of one layer and some rows, on the calling thread; the rows are
 * packed before. workspace: of ls_linear_workspace bytes. */
LS_API int64_t ls_product_ns(const ls_linear *layer, const float *x, int32_t rows, float *y,
                             void *workspace, int32_t repeats) {
    ls_packed_rows packed = ls_packed_at(layer, rows, workspace);
    ls_pack_rows(layer, &packed, 0, rows, x, layer->inputs);
    int64_t least = INT64_MAX;
    for (int i = 0; i < repeats; i++) {
        int64_t began = now_ns();
        ls_multiply_tiles(layer, &packed, 0, ls_tile_count(layer), y, layer->outputs, 0);
        int64_t taken = now_ns() - began;
        if (taken < least) least = taken;
    }
    return least;
}

/* Nanoseconds of this many additions of which each waits for the one before: a cycle each. */
LS_API int64_t ls_additions_ns(int32_t count) {
    int64_t began = now_ns();
    uint64_t sum = 0, step = 3;
    /* not a constant, or some processors add several of them up ahead of time */
    __asm__ volatile("" : "+r"(step));
    for (int i = 0; i < count; i += 16) {
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++) {
            sum += step;
            /* or the compiler would multiply */
            __asm__ volatile("" : "+r"(sum));
        }
    }
    return now_ns() - began;
}
