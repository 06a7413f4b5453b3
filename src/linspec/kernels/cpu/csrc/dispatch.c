/* Which instruction set is used: the best that this processor has, or the one that was asked for. */
#include <stdatomic.h>
#include <string.h>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

#if defined(__x86_64__)
#include <cpuid.h>
/* 16-bit floats are asked for by hand, as some compilers lack the name */
static int runs_avx2(void) {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

static int runs_avx512(void) {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

#ifdef LS_HAVE_AVXVNNI
/* compilers know the name of this feature only since recently */
static int runs_avxvnni(void) {
    unsigned a, b, c, d;
    return runs_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif
#endif

#if defined(__aarch64__)
static int runs_dotprod(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 1; /* every 64-bit Apple processor that runs a current system */
#endif
}
#endif

static int runs_anywhere(void) { return 1; }

/* best first */
static const struct {
    const ls_ops *ops;
    int (*runs)(void);
} sets[] = {
#if defined(__x86_64__)
    {&ls_ops_avx512, runs_avx512},
#ifdef LS_HAVE_AVXVNNI
    {&ls_ops_avxvnni, runs_avxvnni},
#endif
    {&ls_ops_avx2, runs_avx2},
#endif
#if defined(__aarch64__)
    {&ls_ops_neon, runs_dotprod},
#endif
    {&ls_ops_portable, runs_anywhere},
};
#define SETS ((int)(sizeof sets / sizeof *sets))

static _Atomic(const ls_ops *) current;

const ls_ops *ls_current(void) {
    const ls_ops *ops = atomic_load_explicit(&current, memory_order_relaxed);
    if (ops) return ops;
    for (int i = 0; i < SETS && !ops; i++)
        if (sets[i].runs()) ops = sets[i].ops;
    atomic_store(&current, ops);
    return ops;
}

LS_API int32_t ls_abi(void) { return LS_ABI; }

/* Sizes and offsets of the structures that Python fills in, -1 behind the last. */
LS_API const int32_t *ls_layout(void) {
    static const int32_t numbers[] = {LS_LAYOUT, -1};
    return numbers;
}

/* Name of the instruction set in use. */
LS_API const char *ls_isa(void) { return ls_current()->name; }

/* Name of the i-th set that this processor can run, best first; null behind the last. */
LS_API const char *ls_isa_at(int32_t i) {
    for (int s = 0; s < SETS; s++)
        if (sets[s].runs() && i-- == 0) return sets[s].ops->name;
    return NULL;
}

/* Use this set from now on; 0 if the processor cannot run it or nobody knows it. */
LS_API int32_t ls_use_isa(const char *name) {
    for (int s = 0; s < SETS; s++)
        if (strcmp(sets[s].ops->name, name) == 0 && sets[s].runs()) {
            atomic_store(&current, sets[s].ops);
            return 1;
        }
    return 0;
}
