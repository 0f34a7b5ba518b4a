/* The passes that cost most, eight float32 weights at a time with AVX2; included by _native.c.
 *
 * Each takes as many whole eights as there are and returns how many weights that was; the portable
 * passes do the rest, and all of it on other processors, in the same order and with the same bits.
 */

/* What the search needs, in registers where it can be. */
typedef struct {
    __m256 root, low, high, third, fourth, lower, upper; /* up to 16 values: a tree */
    __m256 start, per_unit, top;                         /* more: a grid */
    const Cell *cells;
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
        .cells = s->grid,
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
    __m256i at = deeper(_mm256_castps_si256(half), more);
    if (levels > 2) {
        more = _mm256_cmp_ps(x, _mm256_permutevar8x32_ps(f->third, at), _CMP_GT_OQ);
        at = deeper(at, more);
    }
    if (levels > 3) {
        more = _mm256_cmp_ps(x, _mm256_permutevar8x32_ps(f->fourth, at), _CMP_GT_OQ);
        at = deeper(at, more);
    }
    *minus = at;
    __m256 near = _mm256_permutevar8x32_ps(f->lower, at);
    if (levels < 4) return near;
    return _mm256_blendv_ps(near, _mm256_permutevar8x32_ps(f->upper, at), half);
}

/* Two cells of the grid, for a weight and the one four further on. */
INLINE __m256 two_cells(const Cell *cells, const int32_t *at) {
    __m256 one = _mm256_castps128_ps256(_mm_loadu_ps(&cells[at[0]].bound));
    return _mm256_insertf128_ps(one, _mm_loadu_ps(&cells[at[4]].bound), 1);
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
INLINE __m256 look_up(const Finder *f, const Search *s, __m256 x, __m256i *index) {
    int32_t at[8];
    __m256 place = _mm256_mul_ps(_mm256_sub_ps(x, f->start), f->per_unit);
    place = _mm256_min_ps(place, f->top); /* NaN becomes `top` */
    place = _mm256_max_ps(place, _mm256_set1_ps(-1.0f));
    place = _mm256_add_ps(place, _mm256_set1_ps(1.0f));
    _mm256_storeu_si256((__m256i *)at, _mm256_cvttps_epi32(place));
    __m256 a = two_cells(f->cells, at), b = two_cells(f->cells, at + 1);
    __m256 c = two_cells(f->cells, at + 2), d = two_cells(f->cells, at + 3);
    __m256 ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
    __m256 bound = _mm256_shuffle_ps(ab, cd, 0x44), lower = _mm256_shuffle_ps(ab, cd, 0xee);
    ab = _mm256_unpackhi_ps(a, b);
    cd = _mm256_unpackhi_ps(c, d);
    __m256 upper = _mm256_shuffle_ps(ab, cd, 0x44), below = _mm256_shuffle_ps(ab, cd, 0xee);
    __m256 more = _mm256_cmp_ps(x, bound, _CMP_GT_OQ);
    __m256 near = _mm256_blendv_ps(lower, upper, more);
    int crowded = _mm256_movemask_ps(_mm256_and_ps(more, below)); /* its sign bit: CROWDED */
    *index = _mm256_and_si256(_mm256_castps_si256(below), _mm256_set1_epi32(~CROWDED));
    *index = _mm256_sub_epi32(*index, _mm256_castps_si256(more));
    if (crowded) uncrowd(s, crowded, &x, &near, index);
    return near;
}

/* Return the representatives of eight weights, and their indices; `levels` 0 for the grid. */
INLINE __m256 nearest(const Finder *f, const Search *s, int levels, __m256 x, __m256i *index) {
    if (levels == 0) return look_up(f, s, x, index);
    __m256 near = descend(f, levels, x, index);
    *index = _mm256_sub_epi32(_mm256_setzero_si256(), *index);
    return near;
}

/* Whether there is a search by registers or grid, with the constant that a loop is made for. */
#define BY_LEVELS(s, result, call)                                                             \
    if ((s)->k > TREE && !(s)->cells) result = 0;                                              \
    else if ((s)->levels == 0) result = call(0);                                               \
    else if ((s)->levels == 2) result = call(2);                                               \
    else if ((s)->levels == 3) result = call(3);                                               \
    else result = call(4);

INLINE int locate_eights(const Search *s, int levels, const float *w, int n, uint16_t *index,
                         float *near) {
    const Finder f = finder_of(s);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i at;
        _mm256_storeu_ps(near + i, nearest(&f, s, levels, _mm256_loadu_ps(w + i), &at));
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
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i at;
        __m256 x = _mm256_loadu_ps(w + i);
        __m256 away = _mm256_sub_ps(x, nearest(&f, s, levels, x, &at));
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

/* Sums are formed in two passes over a block, one that searches and one that adds, through these: an
 * addition in memory would otherwise wait for the searches before it. */
typedef struct {
    float values[BLOCK];
    uint32_t places[BLOCK]; /* of a tuple's or a weight's sums, where its first weight has its own */
} Found;

/* Where sums by tuples of neighbours' indices are, of which there are 256: fours of up to 4 values,
 * pairs of up to 16. One addition in memory serves a tuple. */
INLINE void place_fours(uint32_t *places, __m256i index) {
    int high = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_slli_epi32(index, 30)));
    int low = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_slli_epi32(index, 31)));
    places[0] = (low & 15) | (high & 15) << 4;
    places[4] = low >> 4 | (high & 240);
}

INLINE void place_twos(uint32_t *places, __m256i index) {
    index = _mm256_and_si256(_mm256_or_si256(index, _mm256_srli_epi64(index, 28)),
                             _mm256_set1_epi64x(255));
    _mm256_storeu_si256((__m256i *)places, index);
}

/* Where sums of single clusters are: neighbours go to different lanes. */
INLINE void place_ones(uint32_t *places, __m256i index, __m128i shift, __m256i lane) {
    index = _mm256_add_epi32(_mm256_sll_epi32(index, shift), lane);
    _mm256_storeu_si256((__m256i *)places, index);
}

INLINE void add_four(Tuples *t, int lane, uint32_t key, __m256d values) {
    double *to = t->sums[lane][key];
    _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), values));
    t->counts[lane][key]++;
}

INLINE void add_two(double *to, __m256d both) { /* sums in the low half, counts above */
    _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), both));
}

INLINE void add_one(Pair *to, __m128d both) {
    _mm_storeu_pd(&to->sum, _mm_add_pd(_mm_loadu_pd(&to->sum), both));
}

/* Add eight numbers to the sums at their places. */
INLINE void add_eight(const Sums *sums, int size, const uint32_t *places, __m256d a, __m256d b) {
    const __m256d one = _mm256_set1_pd(1.0);
    Tuples *t = sums->tuples;
    if (size == 4) {
        add_four(t, 0, places[0], a);
        add_four(t, 1, places[4], b);
    } else if (size == 2) {
        add_two(t->sums[0][places[0]], _mm256_blend_pd(a, one, 12));
        add_two(t->sums[1][places[2]], _mm256_permute2f128_pd(a, one, 0x21));
        add_two(t->sums[0][places[4]], _mm256_blend_pd(b, one, 12));
        add_two(t->sums[1][places[6]], _mm256_permute2f128_pd(b, one, 0x21));
    } else
        for (int half = 0; half < 8; half += 4, a = b) {
            __m256d even = _mm256_unpacklo_pd(a, one), odd = _mm256_unpackhi_pd(a, one);
            add_one(sums->single + places[half], _mm256_castpd256_pd128(even));
            add_one(sums->single + places[half + 1], _mm256_castpd256_pd128(odd));
            add_one(sums->single + places[half + 2], _mm256_extractf128_pd(even, 1));
            add_one(sums->single + places[half + 3], _mm256_extractf128_pd(odd, 1));
        }
}

/* Search: note the places and, where `away` is wanted, w - representative. */
INLINE void find_eights(const Search *s, int levels, const float *w, int n, int size, int lanes,
                        int away, Found *found) {
    const Finder f = finder_of(s);
    const __m128i shift = _mm_cvtsi32_si128((lanes > 1) + (lanes > 2) + (lanes > 4));
    const __m256i lane = _mm256_and_si256(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                          _mm256_set1_epi32(lanes - 1));
    for (int i = 0; i + 8 <= n; i += 8) {
        __m256i at;
        __m256 x = _mm256_loadu_ps(w + i);
        x = _mm256_sub_ps(x, nearest(&f, s, levels, x, &at));
        if (away) _mm256_storeu_ps(found->values + i, x);
        if (size == 4) place_fours(found->places + i, at);
        else if (size == 2) place_twos(found->places + i, at);
        else place_ones(found->places + i, at, shift, lane);
    }
}

INLINE int sum_eights(const Search *s, int levels, const float *w, const float *values, int n,
                      const Sums *sums, double total[8]) {
    Found found;
    const int size = !sums->tuples ? 1 : levels == 2 ? 4 : 2;
    __m256d first = _mm256_loadu_pd(total), second = _mm256_loadu_pd(total + 4);
    if (size == 4) find_eights(s, levels, w, n, 4, 1, !values, &found);
    else if (size == 2) find_eights(s, levels, w, n, 2, 1, !values, &found);
    else find_eights(s, levels, w, n, 1, sums->lanes, !values, &found);
    const float *from = values ? values : found.values;
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256d a = _mm256_cvtps_pd(_mm_loadu_ps(from + i));
        __m256d b = _mm256_cvtps_pd(_mm_loadu_ps(from + i + 4));
        if (!values) {
            first = _mm256_add_pd(first, _mm256_mul_pd(a, a));
            second = _mm256_add_pd(second, _mm256_mul_pd(b, b));
        }
        add_eight(sums, size, found.places + i, a, b);
    }
    _mm256_storeu_pd(total, first);
    _mm256_storeu_pd(total + 4, second);
    return i;
}

/* Search, and add `values` to the sums by cluster; or, where they are NULL, w - representative, and
 * its square to `total`. */
TARGET static int sum_fast(const Search *s, const float *w, const float *values, int n,
                           const Sums *sums, double total[8]) {
    int done;
#define CALL(levels) sum_eights(s, levels, w, values, n, sums, total)
    BY_LEVELS(s, done, CALL)
#undef CALL
    return done;
}
