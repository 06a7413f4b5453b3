/* Who leaves a step: a thread that had no core, not one that merely had more to do.
 *
 * Thread 1 is late at the only barrier of a call, by as much as is long for a step. Its own clock says that it had a
 * core for most of that ("busy") or for none of it ("away"): the machine cannot be asked for either. Prints whether
 * both go on.
 *
 * cc -Dclock_gettime=told_clock -Isrc/linspec/kernels/cpu/csrc tests/kernels/pool_shares.c
 *    src/linspec/kernels/cpu/csrc/pool.c -pthread */
#define _GNU_SOURCE
#include <stdio.h>
#include <time.h>
#undef clock_gettime
int clock_gettime(clockid_t clock, struct timespec *t);

#include "kernels.h"

enum { LATE = 50000000, INTERRUPTED = LATE / 5, TRIES = 100 };

typedef struct {
    int away, threads, staying;
} lateness;

static _Thread_local int64_t lost;

/* A thread's own clock is that of the machine without what the thread was told to have lost. */
int told_clock(clockid_t clock, struct timespec *t) {
    if (clock != CLOCK_THREAD_CPUTIME_ID) return clock_gettime(clock, t);
    clock_gettime(CLOCK_MONOTONIC, t);
    int64_t ns = t->tv_sec * 1000000000LL + t->tv_nsec - lost;
    t->tv_sec = ns / 1000000000LL;
    t->tv_nsec = ns % 1000000000LL;
    return 0;
}

static void body(void *context, int thread, int threads) {
    lateness *c = context;
    if (thread == 1) {
        nanosleep(&(struct timespec){0, LATE}, NULL);
        lost += c->away ? LATE : INTERRUPTED;
    }
    ls_barrier(threads);
    int staying = threads;
    ls_goes_on(thread, &staying);
    if (thread == 0) c->threads = threads, c->staying = staying;
}

int main(void) {
    for (int away = 0; away < 2; away++) {
        lateness c = {.away = away};
        /* a call begins without a thread that does not come at once, as on a busy machine */
        for (int try = 0; c.threads < 2 && try < TRIES; try++) {
            if (try) nanosleep(&(struct timespec){0, LATE}, NULL);
            ls_parallel(body, &c, 2, LS_SPIN_STEP);
        }
        printf("%s: %d of %d go on\n", away ? "away" : "busy", c.staying, c.threads);
    }
    return 0;
}
