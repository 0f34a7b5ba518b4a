/* The passes that cost most, eight float32 weights at a time with AVX2; included by _native.c.
 *
 * Each takes as many whole eights as there are and returns how many weights that was; the portable
 * passes do the rest, and all of it on other processors, in the same order and with the same bits.
 */

enum { GRID, CROWD }; /* levels of a tree that is none: a grid, and one with crowded cells */

/* In weights: how far ahead they are fetched, as the processor itself stops at the end of a page; for
 * how many something is noted at a time, which stays in L1; and how long cells are noted before they
 * are read: waiting for a store to be loaded again takes longer than the search. */
#define FETCHED 1024
#define RING 128
#define AHEAD 64

/* What the search needs, in registers where it can be. */
typedef struct {
    __m256 root, low, high, third, fourth, lower, upper; /* up to 16 values: a tree */
    __m256 start, per_unit, top;                         /* more: a grid */
    const char *cells;
} Finder;

INLINE Finder finder_of(const Search *s) {
    Finder f = {
        .root = _mm256_set1_ps(s->tree[0]),
        .low = _mm256_set1_ps(s->tree[1]),
        .high = _mm256_set1_ps(s->tree[2]),
        .third = _mm256_loadu_ps(s->tree + 8),
        .fourth = _mm256_loadu_ps(s->tree + 16),
        .lower = _mm256_loadu_ps(s->tree + 24),
        .upper = _mm256_loadu_ps(s->tree + 32),
        .start = _mm256_set1_ps(s->low),
        .per_unit = _mm256_set1_ps(s->per_unit),
        .top = _mm256_set1_ps((float)(s->cells - 2)),
        .cells = (const char *)s->grid,
    };
    return f;
}

/* One more level of the tree: `at` counts down from 0, minus the number of the node. A permutation
 * reads its low three bits, so the tables are stored backwards modulo 8. */
INLINE __m256i deeper(__m256i at, __m256 more) {
    return _mm256_add_epi32(_mm256_add_epi32(at, at), _mm256_castps_si256(more));
}

/* Return the representatives of eight weights by a tree of 2 to 4 levels; `*minus` is set to minus
 * their indices. */
INLINE __m256 descend(const Finder *f, int levels, __m256 x, __m256i *minus) {
    __m256 half = _mm256_cmp_ps(x, f->root, _CMP_GT_OQ);
    __m256 more = _mm256_cmp_ps(x, _mm256_blendv_ps(f->low, f->high, half), _CMP_GT_OQ);
    __m256i at = *minus = deeper(_mm256_castps_si256(half), more);
    if (levels == 2) return _mm256_permutevar_ps(f->lower, at); /* the cheaper one, of four */
    more = _mm256_cmp_ps(x, _mm256_permutevar_ps(f->third, at), _CMP_GT_OQ);
    at = *minus = deeper(at, more);
    __m256 near = _mm256_permutevar8x32_ps(f->lower, at);
    if (levels == 3) return near;
    more = _mm256_cmp_ps(x, _mm256_permutevar8x32_ps(f->fourth, at), _CMP_GT_OQ);
    *minus = deeper(at, more);
    return _mm256_blendv_ps(near, _mm256_permutevar8x32_ps(f->upper, at), more);
}

/* Note in which cells of the grid eight weights are, in bytes. */
INLINE void note_cells(const Finder *f, const float *w, int32_t *at) {
    __m256 place = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(w), f->start), f->per_unit);
    place = _mm256_min_ps(place, f->top); /* NaN becomes `top` */
    place = _mm256_max_ps(place, _mm256_set1_ps(-1.0f));
    place = _mm256_add_ps(place, _mm256_set1_ps(1.0f));
    _mm256_storeu_si256((__m256i *)at, _mm256_slli_epi32(_mm256_cvttps_epi32(place), 4));
}

/* Two cells of the grid, for a weight and the one four further on. */
INLINE __m256 two_cells(const char *cells, const int32_t *at) {
    __m256 one = _mm256_castps128_ps256(_mm_loadu_ps((const float *)(cells + at[0])));
    return _mm256_insertf128_ps(one, _mm_loadu_ps((const float *)(cells + at[4])), 1);
}

/* Where several boundaries share a cell: find the index among them one by one. */
TARGET static void uncrowd(const Search *s, int which, __m256 *x, __m256 *near, __m256i *index) {
    float w[8], c[8];
    int32_t below[8];
    _mm256_storeu_ps(w, *x);
    _mm256_storeu_ps(c, *near);
    _mm256_storeu_si256((__m256i *)below, *index);
    for (int l = 0; l < 8; l++)
        if (which >> l & 1) {
            while (w[l] > s->boundaries[below[l]]) below[l]++;
            c[l] = s->codebook[below[l]];
        }
    *near = _mm256_loadu_ps(c);
    *index = _mm256_loadu_si256((const __m256i *)below);
}

/* Return the representatives of eight weights by the grid: a cell of four numbers is read for each,
 * and the eight of them are transposed. */
INLINE __m256 look_up(const Finder *f, const Search *s, int levels, __m256 x, const int32_t *at,
                      __m256i *index) {
    __m256 a = two_cells(f->cells, at), b = two_cells(f->cells, at + 1);
    __m256 c = two_cells(f->cells, at + 2), d = two_cells(f->cells, at + 3);
    __m256 ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
    __m256 bound = _mm256_shuffle_ps(ab, cd, 0x44), lower = _mm256_shuffle_ps(ab, cd, 0xee);
    ab = _mm256_unpackhi_ps(a, b);
    cd = _mm256_unpackhi_ps(c, d);
    __m256 upper = _mm256_shuffle_ps(ab, cd, 0x44), below = _mm256_shuffle_ps(ab, cd, 0xee);
    __m256 more = _mm256_cmp_ps(x, bound, _CMP_GT_OQ);
    __m256 near = _mm256_blendv_ps(lower, upper, more);
    *index = _mm256_sub_epi32(_mm256_castps_si256(below), _mm256_castps_si256(more));
    if (levels != CROWD) return near;
    int crowded = _mm256_movemask_ps(_mm256_and_ps(more, below)); /* its sign bit: CROWDED */
    *index = _mm256_and_si256(_mm256_castps_si256(below), _mm256_set1_epi32(~CROWDED));
    *index = _mm256_sub_epi32(*index, _mm256_castps_si256(more));
    if (crowded) uncrowd(s, crowded, &x, &near, index);
    return near;
}

/* Begin a search of `n` weights: note the first cells. */
INLINE void begin(const Finder *f, int levels, const float *w, int n, int32_t *cells) {
    for (int i = 0; levels < 2 && i < AHEAD && i + 8 <= n; i += 8) note_cells(f, w + i, cells + i);
}

/* Return the representatives of the eight weights from `i` on, and their indices; `levels` of
 * the tree, GRID or CROWD. */
INLINE __m256 nearest(const Finder *f, const Search *s, int levels, const float *w, unsigned i,
                      unsigned n, int32_t *cells, __m256i *index) {
    __m256 x = _mm256_loadu_ps(w + i);
    _mm_prefetch((const char *)(w + i + FETCHED), _MM_HINT_T0);
    if (levels < 2) {
        unsigned next = i + AHEAD;
        if (next + 8 <= n) note_cells(f, w + next, cells + next % RING);
        return look_up(f, s, levels, x, cells + i % RING, index);
    }
    __m256 near = descend(f, levels, x, index);
    *index = _mm256_sub_epi32(_mm256_setzero_si256(), *index);
    return near;
}

/* Whether there is a search by registers or grid, with the constant that a loop is made for; of more
 * than 4 values, or of any number. */
#define BY_MORE_LEVELS(s, result, call)                                                        \
    if ((s)->k > TREE && !(s)->cells) result = 0;                                              \
    else if ((s)->levels == 0 && (s)->crowded) result = call(CROWD);                           \
    else if ((s)->levels == 0) result = call(GRID);                                            \
    else if ((s)->levels == 3) result = call(3);                                               \
    else result = call(4);
#define BY_LEVELS(s, result, call)                                                             \
    if ((s)->levels == 2) result = call(2);                                                    \
    else BY_MORE_LEVELS(s, result, call)

INLINE int locate_eights(const Search *s, int levels, const float *w, int n, uint16_t *index,
                         float *near) {
    const Finder f = finder_of(s);
    ALIGNED int32_t cells[RING];
    int i = 0;
    begin(&f, levels, w, n, cells);
    for (; i + 8 <= n; i += 8) {
        __m256i at;
        _mm256_storeu_ps(near + i, nearest(&f, s, levels, w, i, n, cells, &at));
        if (index)
            _mm_storeu_si128((__m128i *)(index + i),
                             _mm_packus_epi32(_mm256_castsi256_si128(at),
                                              _mm256_extracti128_si256(at, 1)));
    }
    return i;
}

TARGET static int locate_fast(const Search *s, const float *w, int n, uint16_t *index,
                              float *near) {
    int done;
#define CALL(levels) locate_eights(s, levels, w, n, index, near)
    if (index) {
        BY_LEVELS(s, done, CALL)
    } else {
#undef CALL
#define CALL(levels) locate_eights(s, levels, w, n, NULL, near)
        BY_LEVELS(s, done, CALL)
    }
#undef CALL
    return done;
}

INLINE int pull_eights(const Search *s, int levels, const float *w, int n, float scale,
                       float *out) {
    const Finder f = finder_of(s);
    const __m256 by = _mm256_set1_ps(scale);
    ALIGNED int32_t cells[RING];
    int i = 0;
    begin(&f, levels, w, n, cells);
    for (; i + 8 <= n; i += 8) {
        __m256i at;
        __m256 near = nearest(&f, s, levels, w, i, n, cells, &at);
        __m256 away = _mm256_sub_ps(_mm256_loadu_ps(w + i), near);
        away = _mm256_add_ps(_mm256_loadu_ps(out + i), _mm256_mul_ps(by, away));
        _mm256_storeu_ps(out + i, away);
    }
    return i;
}

/* Search, and add scale x (w - representative) to `out`. */
TARGET static int pull_fast(const Search *s, const float *w, int n, float scale, float *out) {
    int done;
#define CALL(levels) pull_eights(s, levels, w, n, scale, out)
    BY_LEVELS(s, done, CALL)
#undef CALL
    return done;
}

/* What is added, a constant that a loop is made for: distances, with their squares by lane, or values
 * of their own. */
enum { DISTANCES, VALUES };

/* Of up to 4 values: the comparisons that find them mask what is added to sums in registers. */
INLINE __m256 add_by_masks(const Search *s, int what, const float *w, const float *values, int n,
                           const Sums *sums) {
    const Finder f = finder_of(s);
    const __m256 c[4] = {_mm256_set1_ps(s->tree[24]), _mm256_set1_ps(s->tree[31]),
                         _mm256_set1_ps(s->tree[30]), _mm256_set1_ps(s->tree[29])};
    const __m256 zero = _mm256_setzero_ps();
    __m256 sum[4] = {zero, zero, zero, zero}, square = zero;
    __m256i count[3] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    Few few = {0};
    for (int i = 0; i + 8 <= n; i += 8) {
        __m256 x = _mm256_loadu_ps(w + i);
        _mm_prefetch((const char *)(w + i + FETCHED), _MM_HINT_T0);
        __m256 a = _mm256_cmp_ps(x, f.low, _CMP_GT_OQ), b = _mm256_cmp_ps(x, f.root, _CMP_GT_OQ);
        __m256 d = _mm256_cmp_ps(x, f.high, _CMP_GT_OQ), own;
        if (what == DISTANCES) {
            __m256 lower = _mm256_blendv_ps(c[0], c[1], a), upper = _mm256_blendv_ps(c[2], c[3], d);
            own = _mm256_sub_ps(x, _mm256_blendv_ps(lower, upper, b));
            square = _mm256_add_ps(square, _mm256_mul_ps(own, own));
        } else {
            own = _mm256_loadu_ps(values + i);
            _mm_prefetch((const char *)(values + i + FETCHED), _MM_HINT_T0);
        }
        sum[0] = _mm256_add_ps(sum[0], _mm256_andnot_ps(a, own));
        sum[1] = _mm256_add_ps(sum[1], _mm256_andnot_ps(b, _mm256_and_ps(own, a)));
        sum[2] = _mm256_add_ps(sum[2], _mm256_andnot_ps(d, _mm256_and_ps(own, b)));
        sum[3] = _mm256_add_ps(sum[3], _mm256_and_ps(own, d));
        count[0] = _mm256_sub_epi32(count[0], _mm256_castps_si256(a));
        count[1] = _mm256_sub_epi32(count[1], _mm256_castps_si256(b));
        count[2] = _mm256_sub_epi32(count[2], _mm256_castps_si256(d));
    }
    for (int j = 0; j < 4; j++) {
        _mm256_storeu_ps(few.sums[j], sum[j]);
        if (j) _mm256_storeu_si256((__m256i *)few.counts[j], count[j - 1]);
        else for (int l = 0; l < 8; l++) few.counts[0][l] = n / 8;
    }
    add_few(&few, s->k, sums);
    return square;
}

/* What has been found and is not added yet: an addition in memory would else wait for the search
 * before it. */
typedef struct {
    ALIGNED float values[2 * RING];
    ALIGNED uint32_t places[RING]; /* of sums in float32 */
} Found;

/* Of up to 16 values: one addition for two neighbours, at a place that both indices name. */
INLINE void note_pairs(Found *found, int i, __m256 own, __m256i index) {
    index = _mm256_or_si256(index, _mm256_srli_epi64(index, 28));
    index = _mm256_slli_epi64(_mm256_and_si256(index, _mm256_set1_epi64x(255)), 3);
    _mm256_storeu_ps(found->values + i, own);
    _mm256_storeu_si256((__m256i *)(found->places + i), index);
}

INLINE void add_pairs(const Found *found, int i, float *narrow) {
    const __m128 one = _mm_setr_ps(0, 0, 1, 0);
    for (int l = 0; l < 8; l += 2) {
        float *to = narrow + found->places[i + l] + (l & 2) * 2;
        __m128 both = _mm_loadl_pi(one, (const __m64 *)(found->values + i + l));
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), both));
    }
}

/* Of more: neighbours go to different lanes. Values stand beside ones, in the order 0 1 4 5 2 3 6
 * 7. */
INLINE void note_ones(Found *found, int i, __m256 own, __m256i index, __m128i shift,
                      __m256i lane) {
    const __m256 one = _mm256_set1_ps(1.0f);
    index = _mm256_add_epi32(_mm256_sll_epi32(index, shift), lane);
    _mm256_storeu_ps(found->values + 2 * i, _mm256_unpacklo_ps(own, one));
    _mm256_storeu_ps(found->values + 2 * i + 8, _mm256_unpackhi_ps(own, one));
    _mm256_storeu_si256((__m256i *)(found->places + i), index);
}

INLINE void add_one(float *to, const float *from) {
    __m128 own = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)from));
    __m128 sum = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)to));
    _mm_storel_pi((__m64 *)to, _mm_add_ps(sum, own));
}

INLINE void add_ones(const Found *found, int i, float *narrow) {
    const uint32_t *at = found->places + i;
    const float *from = found->values + 2 * i;
    add_one(narrow + at[0], from);
    add_one(narrow + at[1], from + 2);
    add_one(narrow + at[2], from + 8);
    add_one(narrow + at[3], from + 10);
    add_one(narrow + at[4], from + 4);
    add_one(narrow + at[5], from + 6);
    add_one(narrow + at[6], from + 12);
    add_one(narrow + at[7], from + 14);
}

/* Of more than 4 values; of up to 16 by pairs. */
INLINE __m256 add_by_indices(const Search *s, int what, int levels, int pairs, const float *w,
                             const float *values, unsigned n, const Sums *sums) {
    const Finder f = finder_of(s);
    const int lanes = sums->lanes;
    const unsigned late = 32;
    const __m128i shift = _mm_cvtsi32_si128(1 + (lanes > 1) + (lanes > 2) + (lanes > 4));
    const __m256i lane = _mm256_and_si256(_mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14),
                                          _mm256_set1_epi32(2 * lanes - 2));
    __m256 square = _mm256_setzero_ps();
    ALIGNED int32_t cells[RING];
    Found found;
    begin(&f, levels, w, n, cells);
    for (unsigned i = 0; i < n + late; i += 8) {
        if (i < n) {
            __m256i at;
            __m256 own = nearest(&f, s, levels, w, i, n, cells, &at);
            if (what == DISTANCES) {
                own = _mm256_sub_ps(_mm256_loadu_ps(w + i), own);
                square = _mm256_add_ps(square, _mm256_mul_ps(own, own));
            } else {
                own = _mm256_loadu_ps(values + i);
                _mm_prefetch((const char *)(values + i + FETCHED), _MM_HINT_T0);
            }
            if (pairs) note_pairs(&found, i % RING, own, at);
            else note_ones(&found, i % RING, own, at, shift, lane);
        }
        if (i < late) continue;
        if (pairs) add_pairs(&found, (i - late) % RING, sums->narrow);
        else add_ones(&found, (i - late) % RING, sums->narrow);
    }
    return square;
}

INLINE int add_eights(const Search *s, int what, const float *w, const float *values, int n,
                      const Sums *sums, __m256 *squares) {
    int done = 1;
    if (sums->kind == FEW) *squares = add_by_masks(s, what, w, values, n, sums);
    else if (sums->kind == PAIRS && s->levels == 3)
        *squares = add_by_indices(s, what, 3, 1, w, values, n, sums);
    else if (sums->kind == PAIRS) *squares = add_by_indices(s, what, 4, 1, w, values, n, sums);
    else {
#define CALL(levels) (*squares = add_by_indices(s, what, levels, 0, w, values, n, sums), 1)
        BY_MORE_LEVELS(s, done, CALL)
#undef CALL
    }
    return done;
}

/* Search whole eights, and add w - representative to the float32 sums by cluster, and its square by
 * lane; return whether there is a fast search. */
TARGET static int measure_fast(const Search *s, const float *w, int n, const Sums *sums,
                               float squares[8]) {
    __m256 all = _mm256_setzero_ps();
    int done = add_eights(s, DISTANCES, w, NULL, n, sums, &all);
    _mm256_storeu_ps(squares, all);
    return done;
}

/* Do the same with values of the weights' own instead of their distances, without squares. */
TARGET static int add_fast(const Search *s, const float *w, const float *values, int n,
                           const Sums *sums) {
    __m256 none;
    return add_eights(s, VALUES, w, values, n, sums, &none);
}
