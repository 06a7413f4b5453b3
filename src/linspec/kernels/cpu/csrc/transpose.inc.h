/* Squares of integers whose lines become columns. Part of every isa_*.c. */

/* to[i] lane j = from[j] lane i, for as many vectors as a vector has lanes */
#if LS_LANES == 16
#define LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
/* four times, halves are shuffled like a pack of cards */
INLINE void transpose(vli *v) {
    vli w[16];
    for (int round = 0; round < 2; round++) {
        UNROLL(8, i) {
            w[2 * i] = LANE_SHUFFLE(v[i], v[i + 8], LOWER);
            w[2 * i + 1] = LANE_SHUFFLE(v[i], v[i + 8], UPPER);
        }
        UNROLL(8, i) {
            v[2 * i] = LANE_SHUFFLE(w[i], w[i + 8], LOWER);
            v[2 * i + 1] = LANE_SHUFFLE(w[i], w[i + 8], UPPER);
        }
    }
}
#elif LS_LANES == 8
/* within neighbouring fours first, as 256-bit registers shuffle those at once */
INLINE void transpose(vli *v) {
    vli w[8];
    UNROLL(4, i) {
        w[2 * i] = LANE_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        w[2 * i + 1] = LANE_SHUFFLE(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    vli x[8];
    UNROLL(2, i) {
        UNROLL(2, k) {
            x[4 * i + 2 * k] = LANE_SHUFFLE(w[4 * i + k], w[4 * i + 2 + k], 0, 1, 8, 9, 4, 5, 12, 13);
            x[4 * i + 2 * k + 1] = LANE_SHUFFLE(w[4 * i + k], w[4 * i + 2 + k], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    UNROLL(4, i) {
        v[i] = LANE_SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        v[i + 4] = LANE_SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
#else
/* twice shuffled like a pack of cards */
INLINE void transpose(vli *v) {
    vli w[4];
    UNROLL(2, i) {
        w[2 * i] = LANE_SHUFFLE(v[i], v[i + 2], 0, 4, 1, 5);
        w[2 * i + 1] = LANE_SHUFFLE(v[i], v[i + 2], 2, 6, 3, 7);
    }
    UNROLL(2, i) {
        v[2 * i] = LANE_SHUFFLE(w[i], w[i + 2], 0, 4, 1, 5);
        v[2 * i + 1] = LANE_SHUFFLE(w[i], w[i + 2], 2, 6, 3, 7);
    }
}
#endif
