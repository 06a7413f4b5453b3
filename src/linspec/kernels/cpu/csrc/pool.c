/* The pool: threads that wait for the next call, first awake, then asleep.
 *
 * A decode step has a hundred short phases, so no thread is created or woken between them as long as all get a
 * core. Between calls a thread stays awake for as long as the call says: waking it takes as long as half a step of a
 * small model, but torch has threads of its own that want the same cores between the layers of a prompt.
 *
 * Other processes want cores too. A thread that waits for one without a core soon sleeps, which gives its own
 * core away. A call in which a thread lost its core makes the next ones use fewer threads for a while: phases
 * end with the last thread, so two that take turns on a core are slower than one. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>

#include "kernels.h"

#define MOST_THREADS 256
#define SPIN_BARRIER 50000   /* ns; phases end within a few microseconds of each other */
#ifndef LS_HELD_UP
#define LS_HELD_UP 200000    /* ns that nobody waits for a thread that has a core */
#endif
#define LEAST_PAUSE 5000000  /* ns with fewer threads, doubled up to */
#define MOST_PAUSE 320000000 /* as long as that happens again */

static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER; /* held while a call uses the pool */
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;  /* guards sleeping and waking */
static pthread_cond_t wake_signal = PTHREAD_COND_INITIALIZER;

static struct {
    ls_body body;
    void *context;
    int spin_ns;
} job;

/* each on its own cache line: they are polled by all threads */
static _Alignas(64) atomic_uint round_word; /* changes with every call; the low bits say how many threads it has */
static _Alignas(64) atomic_uint finished;   /* calls */
static _Alignas(64) atomic_uint phase;
static _Alignas(64) atomic_int working;
static _Alignas(64) atomic_int arrived;
static _Alignas(64) atomic_int held_up, preempted; /* in this call: somebody waited for long; lost its core */
static atomic_int asleep[MOST_THREADS];
/* Of each thread's share, since the last barrier: one number for phases with an even number and one for the others, so
 * that each thread can set its own back while nobody looks. */
static struct {
    _Alignas(64) atomic_int items[2];
} taken[MOST_THREADS];

static int started = 1; /* threads of the pool, the caller included */
static unsigned joined_at[MOST_THREADS]; /* round before the first one of a thread */
static _Thread_local int me, parity; /* the thread; whether the number of its phase is odd */
static struct {
    int left_out; /* threads, until then */
    int64_t until, pause;
} crowd = {1, 0, LEAST_PAUSE};

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

/* ---- waiting */

static void sleep_until_change(atomic_uint *word, unsigned seen) {
    pthread_mutex_lock(&sleep_lock);
    atomic_store(&asleep[me], 1);
    while (atomic_load(word) == seen) pthread_cond_wait(&wake_signal, &sleep_lock);
    atomic_store(&asleep[me], 0);
    pthread_mutex_unlock(&sleep_lock);
}

/* Whether the word changes within a microsecond or so. */
static int changes_soon(atomic_uint *word, unsigned seen) {
    for (int i = 0; i < 64; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != seen) return 1;
        cpu_pause();
    }
    return 0;
}

/* Returns how long it took, 0 if it did not have to sleep. */
static int64_t wait_for_change(atomic_uint *word, unsigned seen, int spin_ns) {
    if (changes_soon(word, seen)) return 0;
    int64_t began = now_ns();
    while (now_ns() - began < spin_ns)
        if (changes_soon(word, seen)) return 0;
    sleep_until_change(word, seen);
    return now_ns() - began;
}

static void change(atomic_uint *word, unsigned to, int threads) {
    atomic_store(word, to);
    for (int t = 0; t < threads; t++)
        if (atomic_load(&asleep[t])) {
            pthread_mutex_lock(&sleep_lock);
            pthread_cond_broadcast(&wake_signal);
            pthread_mutex_unlock(&sleep_lock);
            return;
        }
}

/* ---- phases of a call */

static void begin_phase(unsigned number) {
    parity = (int)(number & 1);
    atomic_store_explicit(&taken[me].items[!parity], 0, memory_order_relaxed);
}

void ls_barrier(int threads) {
    if (threads <= 1) return;
    unsigned before = atomic_load(&phase);
    if (atomic_fetch_add(&arrived, 1) == threads - 1) {
        atomic_store_explicit(&arrived, 0, memory_order_relaxed);
        change(&phase, before + 1, threads);
    } else if (wait_for_change(&phase, before, SPIN_BARRIER) > LS_HELD_UP) {
        atomic_store(&held_up, 1);
    }
    begin_phase(before + 1);
}

/* Take from the share of `owner`: p->most items, or what is left of it. */
static int take_from(ls_pieces *p, int owner) {
    int begin = ls_share(p->count, owner, p->threads);
    int end = ls_share(p->count, owner + 1, p->threads);
    atomic_int *items = &taken[owner].items[parity];
    int at = atomic_load_explicit(items, memory_order_relaxed), n;
    do {
        int left = end - begin - at;
        if (left <= 0) return 0;
        n = left < p->most ? left : p->most;
    } while (!atomic_compare_exchange_weak_explicit(items, &at, at + n, memory_order_relaxed,
                                                    memory_order_relaxed));
    p->first = begin + at;
    p->last = p->first + n;
    return 1;
}

int ls_take(ls_pieces *p) {
    if (p->threads <= 1) {
        p->first = p->last;
        p->last = p->count;
        return p->first < p->last;
    }
    for (; p->others < p->threads; p->others++)
        if (take_from(p, (p->thread + p->others) % p->threads)) return 1;
    return 0;
}

/* ---- threads and calls */

/* Whether this thread was made to give its core away since it was last asked. */
static int lost_core(void) {
#ifdef RUSAGE_THREAD
    static _Thread_local long before;
    struct rusage usage;
    if (getrusage(RUSAGE_THREAD, &usage) != 0) return 1;
    int more = usage.ru_nivcsw != before;
    before = usage.ru_nivcsw;
    return more;
#else
    return 1;
#endif
}

static void take_part(int thread, int threads) {
    begin_phase(atomic_load(&phase));
    job.body(job.context, thread, threads);
    if (lost_core()) atomic_store(&preempted, 1);
}

static void *work(void *argument) {
    me = (int)(intptr_t)argument;
    int spin_ns = LS_SPIN_LAYER;
    unsigned seen = joined_at[me];
    for (;;) {
        wait_for_change(&round_word, seen, spin_ns);
        seen = atomic_load(&round_word);
        int threads = (int)(seen % (2 * MOST_THREADS));
        if (me >= threads) {
            /* nothing else of the call may be read, which does not wait for this thread */
            spin_ns = 0;
            continue;
        }
        take_part(me, threads);
        spin_ns = job.spin_ns;
        if (atomic_fetch_sub(&working, 1) == 1) change(&finished, atomic_load(&finished) + 1, 1);
    }
    return NULL;
}

/* A forked child has the calling thread only: it starts over with a pool of its own. */
static void reset_after_fork(void) {
    pthread_mutex_init(&in_use, NULL);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&wake_signal, NULL);
    atomic_store(&arrived, 0);
    for (int t = 0; t < MOST_THREADS; t++) atomic_store(&asleep[t], 0);
    started = 1;
}

/* Threads exist before a round begins, or its barriers would wait for one that never came. */
static int start(int threads) {
    static int watched = 0;
    if (!watched) watched = pthread_atfork(NULL, NULL, reset_after_fork) == 0;
    while (started < threads) {
        pthread_t id;
        joined_at[started] = atomic_load(&round_word);
        if (pthread_create(&id, NULL, work, (void *)(intptr_t)started) != 0) return 0;
        pthread_detach(id);
        started++;
    }
    return 1;
}

static void run_round(ls_body body, void *context, int threads, int spin_ns) {
    job.body = body;
    job.context = context;
    job.spin_ns = spin_ns;
    atomic_store(&working, threads - 1);
    int odd = (int)(atomic_load(&phase) & 1);
    for (int t = 0; t < threads; t++)
        atomic_store_explicit(&taken[t].items[odd], 0, memory_order_relaxed);
    unsigned before = atomic_load(&finished);
    unsigned next = (atomic_load(&round_word) / (2 * MOST_THREADS) + 1) * 2 * MOST_THREADS;
    change(&round_word, next + (unsigned)threads, threads);
    take_part(0, threads);
    if (wait_for_change(&finished, before, SPIN_BARRIER) > LS_HELD_UP) atomic_store(&held_up, 1);
}

/* How many of `threads` the next call uses. */
static int uncrowded(int threads) {
    if (now_ns() > crowd.until) return threads;
    return threads > crowd.left_out ? threads - crowd.left_out : 1;
}

/* What a call with `used` of `threads` has shown. */
static void learn(int threads, int used) {
    int lost = atomic_exchange(&preempted, 0);
    if (!atomic_exchange(&held_up, 0) || !lost) return;
    int64_t now = now_ns();
    int again = now - crowd.until < 2 * crowd.pause;
    if (used < threads || !again) crowd.left_out = threads - used + 1;
    crowd.pause = !again ? LEAST_PAUSE : crowd.pause < MOST_PAUSE ? 2 * crowd.pause : MOST_PAUSE;
    crowd.until = now + crowd.pause;
}

void ls_parallel(ls_body body, void *context, int threads, int spin_ns) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    /* a second caller at the same time does its work alone: results do not depend on the count */
    if (threads <= 1 || pthread_mutex_trylock(&in_use) != 0) {
        body(context, 0, 1);
        return;
    }
    int used = uncrowded(threads);
    if (used > 1 && start(threads)) {
        run_round(body, context, used, spin_ns);
        learn(threads, used);
    } else {
        body(context, 0, 1);
    }
    pthread_mutex_unlock(&in_use);
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
