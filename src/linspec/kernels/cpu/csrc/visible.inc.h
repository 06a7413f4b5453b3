/* Which rows a node sees. Part of every isa_*.c. */

/* The rows that a node sees: how many, the first of them, how many are far, which staged rows are its ancestors. Nodes
 * that overwrite have none of their own: they see what is committed, before and behind them. */
typedef struct {
    int32_t count, first, far;
    uint8_t ancestors[LS_MAX_NODES];
} visible_rows;

/* where the last `span` groups begin of so many rows */
INLINE int32_t span_begin(int32_t count, int64_t group, int64_t span) {
    int64_t first = ((count - 1) / group - (span - 1)) * group;
    return first > 0 ? (int32_t)first : 0;
}

static void find_visible(const ls_mixer *m, int node, visible_rows *v) {
    uint64_t seen = m->ancestors ? m->ancestors[m->staged - m->nodes + node] : 0;
    v->count = m->committed;
    for (; seen; seen &= seen - 1)
        v->ancestors[v->count++ - m->committed] = (uint8_t)__builtin_ctzll(seen);
    v->first = m->window && v->count > m->window ? v->count - (int32_t)m->window : 0;
    if (m->group) v->first = span_begin(v->count, m->group, m->span);
    v->far = m->far_group ? span_begin(v->count, m->far_group, m->far_span) : 0;
}

/* index of the row at `position`, which may be negative for values */
INLINE int row_at(const ls_mixer *m, const visible_rows *v, int position) {
    return position < m->committed ? position : m->committed + v->ancestors[position - m->committed];
}

/* where a row of `bytes` is: in a page, or in the buffer of its kv head, which has those behind the pages and, with negative
 * indices, those ahead of all */
INLINE const char *row_address(const ls_mixer *m, const char *buffer, int64_t in_page, int bytes, int64_t row) {
    if (row >= 0 && row < m->paged) return m->pages[row / LS_PAGE] + in_page + row % LS_PAGE * bytes;
    return buffer + (row < 0 ? row : row - m->paged) * bytes;
}

INLINE const char *key_address(const ls_mixer *m, const char *buffer, int64_t row) {
    return row_address(m, buffer, m->page_keys, m->row_bytes, row);
}

INLINE const char *value_address(const ls_mixer *m, const char *buffer, int64_t row) {
    return row_address(m, buffer, m->page_values, m->value_bytes, row);
}
