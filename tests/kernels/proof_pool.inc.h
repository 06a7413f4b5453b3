/* Every piece of every phase is done once, and seen by the next phase, whatever the number of threads, also where
 * some come late or leave. */

enum { ITEMS = 1000, PHASES = 6 };

typedef struct {
    int most, count[ITEMS], sum[ITEMS];
} phases;

static void phases_body(void *context, int thread, int threads) {
    phases *c = context;
    for (int phase = 0; phase < PHASES; phase++) {
        for (ls_pieces p = ls_pieces_of(ITEMS, c->most, thread, threads); ls_take(&p);)
            for (int i = p.first; i < p.last; i++) c->count[i]++;
        ls_barrier(threads);
        for (ls_pieces p = ls_pieces_of(ITEMS, 1 + c->most / 3, thread, threads); ls_take(&p);)
            for (int i = p.first; i < p.last; i++) c->sum[i] += c->count[ITEMS - 1 - i];
        ls_barrier(threads);
        if (!ls_goes_on(thread, &threads)) return;
    }
}

static void pieces(void) {
    const int threads[] = {2, 4, 1, 3, 5, 2, 7};
    phases *c = need(sizeof *c);
    memset(c, 0, sizeof *c);
    int count = 0, sum = 0;
    for (int call = 0; call < 210; call++) {
        c->most = 1 + call % 40;
        /* now and then the threads have gone to sleep in between */
        ls_parallel(phases_body, c, threads[call % 7], call % 3 ? LS_SPIN_STEP : 0);
        for (int phase = 0; phase < PHASES; phase++) sum += ++count;
        int wrong = 0;
        for (int i = 0; i < ITEMS; i++) wrong += c->count[i] != count || c->sum[i] != sum;
        expect(wrong == 0, "pieces", call, threads[call % 7], wrong, 0);
    }
    free(c);
}
