/* The pool: threads that wait for the next call, first spinning, then asleep.
 *
 * A decode step has a hundred short phases, so threads wait at a spinning barrier and no thread is
 * created or woken between them. Between calls a thread spins for as long as the call says: waking it
 * takes as long as half a step of a small model, but torch has threads of its own that want the same cores
 * between the layers of a prompt.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "kernels.h"

#define MOST_THREADS 256
#define BARRIER_SPINS 4000 /* then let others run: the thread waited for may need this core */

static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER; /* held while a call uses the pool */
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;  /* guards sleeping and waking */
static pthread_cond_t wake_signal = PTHREAD_COND_INITIALIZER;

static struct {
    ls_body body;
    void *context;
    int threads, spin_ns;
} job;

/* each on its own cache line: they are polled by all threads */
static _Alignas(64) atomic_uint round_number;
static _Alignas(64) atomic_int working;
static _Alignas(64) atomic_int sleeping;
static _Alignas(64) atomic_int arrived;
static _Alignas(64) atomic_uint phase;
static int started = 1; /* threads of the pool, the caller included */
static unsigned joined_at[MOST_THREADS]; /* round before the first one of a thread */

static inline void cpu_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void sleep_until_round(unsigned seen) {
    pthread_mutex_lock(&sleep_lock);
    atomic_fetch_add(&sleeping, 1);
    while (atomic_load(&round_number) == seen) pthread_cond_wait(&wake_signal, &sleep_lock);
    atomic_fetch_sub(&sleeping, 1);
    pthread_mutex_unlock(&sleep_lock);
}

static void wait_for_round(unsigned seen, int spin_ns) {
    int64_t until = now_ns() + spin_ns;
    for (;;) {
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(&round_number, memory_order_acquire) != seen) return;
            cpu_pause();
        }
        if (now_ns() > until) {
            sleep_until_round(seen);
            return;
        }
    }
}

static void *work(void *argument) {
    int thread = (int)(intptr_t)argument, spin_ns = LS_SPIN_LAYER;
    unsigned seen = joined_at[thread];
    for (;;) {
        wait_for_round(seen, spin_ns);
        seen = atomic_load(&round_number);
        if (thread < job.threads) job.body(job.context, thread, job.threads);
        spin_ns = job.spin_ns;
        atomic_fetch_sub(&working, 1);
    }
    return NULL;
}

/* A forked child has the calling thread only: it starts over with a pool of its own. */
static void reset_after_fork(void) {
    pthread_mutex_init(&in_use, NULL);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&wake_signal, NULL);
    atomic_store(&working, 0);
    atomic_store(&sleeping, 0);
    atomic_store(&arrived, 0);
    started = 1;
}

/* Threads exist before a round begins, or its barriers would wait for one that never came. */
static int start(int threads) {
    static int watched = 0;
    if (!watched) watched = pthread_atfork(NULL, NULL, reset_after_fork) == 0;
    while (started < threads) {
        pthread_t id;
        joined_at[started] = atomic_load(&round_number);
        if (pthread_create(&id, NULL, work, (void *)(intptr_t)started) != 0) return 0;
        pthread_detach(id);
        started++;
    }
    return 1;
}

static void wait_for_workers(void) {
    for (int spins = 0; atomic_load_explicit(&working, memory_order_acquire) > 0; spins++)
        spins < BARRIER_SPINS ? cpu_pause() : (void)sched_yield();
}

static void run_round(ls_body body, void *context, int threads, int spin_ns) {
    job.body = body;
    job.context = context;
    job.threads = threads;
    job.spin_ns = spin_ns;
    atomic_store(&working, started - 1);
    atomic_fetch_add(&round_number, 1);
    if (atomic_load(&sleeping) > 0) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&wake_signal);
        pthread_mutex_unlock(&sleep_lock);
    }
    body(context, 0, threads);
    wait_for_workers();
}

void ls_parallel(ls_body body, void *context, int threads, int spin_ns) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    /* a second caller at the same time does its work alone: results do not depend on the count */
    if (threads <= 1 || pthread_mutex_trylock(&in_use) != 0) {
        body(context, 0, 1);
        return;
    }
    if (start(threads))
        run_round(body, context, threads, spin_ns);
    else
        body(context, 0, 1);
    pthread_mutex_unlock(&in_use);
}

void ls_barrier(int threads) {
    if (threads <= 1) return;
    unsigned before = atomic_load(&phase);
    if (atomic_fetch_add(&arrived, 1) == threads - 1) {
        atomic_store(&arrived, 0);
        atomic_fetch_add(&phase, 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&phase, memory_order_acquire) == before; spins++)
        spins < BARRIER_SPINS ? cpu_pause() : (void)sched_yield();
}

void *ls_scratch(size_t bytes) {
    static _Thread_local void *memory;
    static _Thread_local size_t have;
    if (bytes > have) {
        free(memory);
        have = (bytes + bytes / 2 + 63) / 64 * 64;
        memory = aligned_alloc(64, have);
        if (memory == NULL) abort(); /* a few megabytes: nothing could go on without them */
    }
    return memory;
}
