/* The pool: threads that wait for the next call, first awake, then asleep.
 *
 * A decode step has a hundred short phases, so no thread is created or woken between them as long as all get a
 * core. Between calls a thread stays awake for as long as the call says: waking it takes as long as half a step of a
 * small model, but torch has threads of its own that want the same cores between the layers of a prompt.
 *
 * Other processes want cores too. Phases end with the last thread, so two that take turns on a core are slower than
 * one. Nobody waits for long for a thread that has no core, if it can be helped:
 * - a call first asks who is there, and begins without those that do not come at once;
 * - a thread that let others wait because it had no core leaves the call where that is possible (ls_goes_on), and
 *   the next calls use a thread less for a while;
 * - a thread that waits soon sleeps, which gives its own core away. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "kernels.h"

#define MOST_THREADS 256
#define SPIN_BARRIER 50000   /* ns; phases end within a few microseconds of each other */
#ifndef LS_HELD_UP
#define LS_HELD_UP 200000    /* ns that nobody waits for a thread that has a core */
#endif
#define LEAST_PAUSE 5000000  /* ns with fewer threads, doubled up to */
#define MOST_PAUSE 320000000 /* as long as that happens again */
#define LONG_CALL 20000000   /* ns: what happened in it says nothing of the next one */

static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER; /* held while a call uses the pool */
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;  /* guards sleeping and waking */
static pthread_cond_t wake_signal = PTHREAD_COND_INITIALIZER;
static int64_t signalled; /* when that was last; sleep_lock guards it */

static struct {
    ls_body body;
    void *context;
    int threads, spin_ns;
} job;

/* Each on its own cache line: they are polled by all threads. The number of a call is a multiple of NUMBER. */
#define NUMBER (2 * MOST_THREADS)
static _Alignas(64) atomic_uint muster;     /* of the present call, plus how many threads are asked to come */
static _Alignas(64) atomic_uint round_word; /* of the last call that has begun */
static _Alignas(64) atomic_uint finished;   /* calls */
static _Alignas(64) atomic_uint phase;
static _Alignas(64) atomic_int working;
static _Alignas(64) atomic_int arrived;
static _Alignas(64) atomic_int staying;      /* threads of this call that go on; changes at a barrier only */
static atomic_int late;                      /* in this call a thread without a core held up the others */
static _Atomic int64_t waiting_since;        /* of who last went to sleep at a barrier */
/* Of a thread of the pool: the call that it came to; a call and the thread's number there, 0 if it came too late. */
static struct {
    _Alignas(64) atomic_uint came;
    atomic_uint given;
} place[MOST_THREADS];
enum { BETWEEN_CALLS, IN_CALL }; /* a thread goes by its number in the pool, or by that in the call */
static atomic_int asleep[2][MOST_THREADS];
/* Of each thread's share, since the last barrier: one number for phases with an even number and one for the others, so
 * that each thread can set its own back while nobody looks. */
static struct {
    _Alignas(64) atomic_int items[2];
} taken[MOST_THREADS];

static int started = 1; /* threads of the pool, the caller included */
static unsigned joined_at[MOST_THREADS]; /* muster before the first one of a thread */
static _Thread_local int me, parity; /* the thread's number in the call; whether that of its phase is odd */
/* Of a thread, since it was last asked whether it lost its core: when that was, on the clock of the machine and on its
 * own; and how long it slept of its own will. */
static _Thread_local struct {
    int64_t wall, own, slept;
} asked;
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

static int64_t clock_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

/* ---- waiting */

static void sleep_until_change(atomic_uint *word, unsigned seen, atomic_int *flag) {
    int64_t began = now_ns(), until = began;
    pthread_mutex_lock(&sleep_lock);
    atomic_store(flag, 1);
    while (atomic_load(word) == seen) {
        pthread_cond_wait(&wake_signal, &sleep_lock);
        /* what comes after the signal is not its own will */
        until = signalled;
    }
    atomic_store(flag, 0);
    pthread_mutex_unlock(&sleep_lock);
    if (until > began) asked.slept += until - began;
}

/* Whether the word changes within a microsecond or so. */
static int changes_soon(atomic_uint *word, unsigned seen) {
    for (int i = 0; i < 64; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != seen) return 1;
        cpu_pause();
    }
    return 0;
}

static void wait_for_change(atomic_uint *word, unsigned seen, int spin_ns, int where, int number) {
    if (changes_soon(word, seen)) return;
    int64_t began = now_ns();
    while (now_ns() - began < spin_ns)
        if (changes_soon(word, seen)) return;
    if (where == IN_CALL) atomic_store(&waiting_since, began);
    sleep_until_change(word, seen, &asleep[where][number]);
}

static int anyone_asleep(int where, int threads) {
    for (int t = 0; t < threads; t++)
        if (atomic_load(&asleep[where][t])) return 1;
    return 0;
}

static void change(atomic_uint *word, unsigned to, int where, int threads) {
    atomic_store(word, to);
    if (!anyone_asleep(where, threads)) return;
    pthread_mutex_lock(&sleep_lock);
    signalled = now_ns();
    pthread_cond_broadcast(&wake_signal);
    pthread_mutex_unlock(&sleep_lock);
}

/* For how long this thread had no core since it was last asked: it had to give it away, or got none when it was
 * woken. */
static int64_t lost_ns(void) {
    int64_t wall = now_ns(), own = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    int64_t lost = wall - asked.wall - (own - asked.own) - asked.slept;
    asked.wall = wall;
    asked.own = own;
    asked.slept = 0;
    return lost;
}

/* Asked of the thread for which `threads` have waited: whether that was for want of a core, not because its share was
 * the larger one, as in the long phases of a prompt. */
static int held_up_by_me(int threads) {
    if (!anyone_asleep(IN_CALL, threads)) return 0;
    int64_t waited = now_ns() - atomic_load(&waiting_since);
    return waited > LS_HELD_UP && lost_ns() > waited / 2;
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
        if (held_up_by_me(threads)) {
            atomic_store(&late, 1);
            atomic_store(&staying, threads - 1);
        }
        change(&phase, before + 1, IN_CALL, threads);
    } else {
        wait_for_change(&phase, before, SPIN_BARRIER, IN_CALL, me);
    }
    begin_phase(before + 1);
}

int ls_goes_on(int thread, int *threads) {
    /* it was set before all passed the last barrier, and will not be again until all have come to the next */
    if (*threads > 1) *threads = atomic_load(&staying);
    return thread < *threads;
}

/* Take from the share of `owner`: p->most items, or what is left of it. */
static int take_from(ls_pieces *p, int owner) {
    int begin = p->begins ? p->begins[owner] : ls_share(p->count, owner, p->threads);
    int end = p->begins ? p->begins[owner + 1] : ls_share(p->count, owner + 1, p->threads);
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

static void take_part(int thread, int threads) {
    lost_ns();
    me = thread;
    begin_phase(atomic_load(&phase));
    job.body(job.context, thread, threads);
}

/* Come to the call that is being made; returns the thread's number there, 0 if the call began without it. */
static int come(int thread, unsigned call) {
    atomic_store(&place[thread].came, call);
    for (unsigned last; (int)((last = atomic_load(&round_word)) - call) < 0;)
        wait_for_change(&round_word, last, SPIN_BARRIER, BETWEEN_CALLS, thread);
    unsigned given = atomic_load(&place[thread].given);
    return given / NUMBER == call / NUMBER ? (int)(given % NUMBER) : 0;
}

static void *work(void *argument) {
    int thread = (int)(intptr_t)argument, spin_ns = LS_SPIN_LAYER, number;
    unsigned seen = joined_at[thread];
    for (;;) {
        wait_for_change(&muster, seen, spin_ns, BETWEEN_CALLS, thread);
        seen = atomic_load(&muster);
        spin_ns = 0;
        /* nothing else of a call may be read that does not wait for this thread */
        if (thread >= (int)(seen % NUMBER) || !(number = come(thread, seen - seen % NUMBER))) continue;
        spin_ns = job.spin_ns;
        take_part(number, job.threads);
        if (atomic_fetch_sub(&working, 1) == 1) {
            if (held_up_by_me(1)) atomic_store(&late, 1);
            change(&finished, atomic_load(&finished) + 1, IN_CALL, 1);
        }
    }
    return NULL;
}

/* A forked child has the calling thread only: it starts over with a pool of its own. */
static void reset_after_fork(void) {
    pthread_mutex_init(&in_use, NULL);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&wake_signal, NULL);
    atomic_store(&arrived, 0);
    for (int t = 0; t < MOST_THREADS; t++)
        for (int where = 0; where < 2; where++) atomic_store(&asleep[where][t], 0);
    started = 1;
}

/* Make threads that a call can ask to come. */
static int start(int threads) {
    static int watched = 0;
    if (!watched) watched = pthread_atfork(NULL, NULL, reset_after_fork) == 0;
    while (started < threads) {
        pthread_t id;
        joined_at[started] = atomic_load(&muster);
        if (pthread_create(&id, NULL, work, (void *)(intptr_t)started) != 0) return 0;
        pthread_detach(id);
        started++;
    }
    return 1;
}

/* Ask threads to come, and number those that do; returns how many there are, the caller included. */
static int gather(unsigned call, int asked) {
    int came = 1, threads = 1;
    change(&muster, call + (unsigned)asked, BETWEEN_CALLS, asked);
    int64_t began = now_ns();
    while (came < asked && now_ns() - began < LS_HELD_UP)
        for (int i = 0; i < 64 && came < asked; i++) {
            cpu_pause();
            while (came < asked && atomic_load_explicit(&place[came].came, memory_order_acquire) == call) came++;
        }
    for (int t = 1; t < asked; t++) {
        int is_there = atomic_load(&place[t].came) == call;
        atomic_store(&place[t].given, call + (unsigned)(is_there ? threads : 0));
        threads += is_there;
    }
    return threads;
}

static void run_round(ls_body body, void *context, int asked, int spin_ns) {
    unsigned call = (atomic_load(&muster) / NUMBER + 1) * NUMBER, before = atomic_load(&finished);
    int threads = gather(call, asked), odd = (int)(atomic_load(&phase) & 1);
    job.body = body;
    job.context = context;
    job.threads = threads;
    job.spin_ns = spin_ns;
    atomic_store(&late, threads < asked);
    atomic_store(&staying, threads);
    atomic_store(&working, threads - 1);
    for (int t = 0; t < threads; t++)
        atomic_store_explicit(&taken[t].items[odd], 0, memory_order_relaxed);
    change(&round_word, call, BETWEEN_CALLS, asked);
    take_part(0, threads);
    if (threads > 1) wait_for_change(&finished, before, SPIN_BARRIER, IN_CALL, 0);
}

/* How many of `threads` the next call uses. */
static int uncrowded(int threads) {
    if (now_ns() > crowd.until) return threads;
    return threads > crowd.left_out ? threads - crowd.left_out : 1;
}

/* What a call with `used` of `threads` has shown that began then. */
static void learn(int threads, int used, int64_t began) {
    int64_t now = now_ns();
    if (!atomic_load(&late) || now - began > LONG_CALL) return;
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
        int64_t began = now_ns();
        run_round(body, context, used, spin_ns);
        learn(threads, used, began);
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
