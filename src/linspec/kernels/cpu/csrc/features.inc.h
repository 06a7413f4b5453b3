/* Features of rows of every kind as floats, a vector at a time. Part of every isa_*.c. */

#ifndef LS_LANES_WORDS
INLINE vli load_words(const char *at) {
    vlh words;
    memcpy(&words, at, sizeof words);
    return __builtin_convertvector(words, vli);
}
#else
INLINE vli load_words(const char *at) { return LS_LANES_WORDS(at); }
#endif

INLINE vl widen_bfloat16(const char *at) { return vl_bits(load_words(at) << 16); }

/* Halves are floats with a smaller exponent; what lies beyond it are infinities and NaN. */
#ifndef LS_LANES_HALF
INLINE vl widen_float16(const char *at) {
    vli bits = load_words(at), low = bits & 0x7fff;
    vl finite = vl_bits(low << 13) * vl_set1(0x1p112f);
    vl beyond = vl_bits((low << 13) | 0x7f800000);
    vl size = vl_select(low >= 0x7c00, beyond, finite);
    return vl_bits(vli_bits(size) | (bits & 0x8000) << 16);
}
#else
INLINE vl widen_float16(const char *at) { return LS_LANES_HALF(at); }
#endif

#ifndef LS_LANES_CODES
INLINE vl widen_codes(const char *at) {
    vl v;
    for (int i = 0; i < LS_LANES; i++) v[i] = (float)(signed char)at[i];
    return v;
}
#else
INLINE vl widen_codes(const char *at) { return LS_LANES_CODES(at); }
#endif

INLINE int feature_bytes(int kind) { return kind == LS_INT8 ? 1 : kind == LS_F32 ? 4 : 2; }

/* as many features as a vector has lanes; kind: a constant */
INLINE vl load_features(const char *at, int kind) {
    return kind == LS_F32    ? vl_load((const float *)at)
           : kind == LS_BF16 ? widen_bfloat16(at)
           : kind == LS_F16  ? widen_float16(at)
                             : widen_codes(at);
}

/* The cache lines that begin in `bytes` bytes: of a block behind the present one, as several queries take so long
 * over a block that processors stop looking ahead. Spread over the work, as only so many lines can be on their way. */
INLINE void prefetch(const char *from, int64_t bytes) {
    uintptr_t line = ((uintptr_t)from + 63) & ~(uintptr_t)63, end = (uintptr_t)from + (uintptr_t)bytes;
    for (; line < end; line += 64) __builtin_prefetch((const void *)line);
}
