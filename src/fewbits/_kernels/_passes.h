/* The passes over the weights, included by _native.c once per instruction set.
 *
 * The includer defines NAME(x), a suffix for names; TARGET, the functions' attribute; and SIMD, 1
 * where AVX2 and F16C may be used. Both variants do the same arithmetic in the same order, without
 * fused multiply-add, so they give the same bits.
 */

/* ---- widening and narrowing ------------------------------------------------------------- */

/* Return `n` numbers from element `at` on as float32: in place, or widened into `buffer`. */
TARGET static const float *NAME(load)(const void *data, int type, int64_t at, int n,
                                      float *buffer) {
    if (type == FLOAT32) return (const float *)data + at;
    const uint16_t *from = (const uint16_t *)data + at;
    if (type == BFLOAT16) {
        for (int i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)from[i] << 16;
            memcpy(buffer + i, &bits, 4);
        }
        return buffer;
    }
    int i = 0;
#if SIMD
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(buffer + i,
                         _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
    for (; i < n; i++) buffer[i] = from_half(from[i]);
    return buffer;
}

/* Write `n` float32 numbers from element `at` on, rounded to the nearest, ties to even. */
TARGET static void NAME(store)(void *data, int type, int64_t at, int n, const float *values) {
    if (type == FLOAT32) {
        memcpy((float *)data + at, values, n * sizeof(float));
        return;
    }
    uint16_t *to = (uint16_t *)data + at;
    if (type == BFLOAT16) {
        for (int i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, values + i, 4);
            uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
            to[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
        }
        return;
    }
    int i = 0;
#if SIMD
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), 0));
#endif
    for (; i < n; i++) to[i] = to_half(values[i]);
}

/* ---- the search ------------------------------------------------------------------------- */

#if SIMD
/* Up to 16 values: a tree of 15 boundaries held in registers, four comparisons a weight.
 *
 * `at` counts down from 0: after each level it is minus the number of the node. A permutation
 * reads its low three bits, so the tables are stored backwards modulo 8.
 */
typedef struct {
    __m256 root, low, high, third, fourth, lower, upper;
} NAME(Tree);

TARGET static inline NAME(Tree) NAME(tree_of)(const Search *s) {
    NAME(Tree) t = {_mm256_set1_ps(s->tree[0]),      _mm256_set1_ps(s->tree[1]),
                    _mm256_set1_ps(s->tree[2]),      _mm256_loadu_ps(s->tree + 8),
                    _mm256_loadu_ps(s->tree + 16),   _mm256_loadu_ps(s->tree + 24),
                    _mm256_loadu_ps(s->tree + 32)};
    return t;
}

/* Return the representatives of eight weights; `*minus` is set to minus their indices. */
TARGET static inline __m256 NAME(descend)(const NAME(Tree) *t, __m256 x, __m256i *minus) {
    __m256 half = _mm256_cmp_ps(x, t->root, _CMP_GT_OQ);
    __m256 other = _mm256_cmp_ps(x, _mm256_blendv_ps(t->low, t->high, half), _CMP_GT_OQ);
    __m256i at = _mm256_castps_si256(half);
    at = _mm256_add_epi32(_mm256_add_epi32(at, at), _mm256_castps_si256(other));
    __m256 more = _mm256_cmp_ps(x, _mm256_permutevar8x32_ps(t->third, at), _CMP_GT_OQ);
    at = _mm256_add_epi32(_mm256_add_epi32(at, at), _mm256_castps_si256(more));
    more = _mm256_cmp_ps(x, _mm256_permutevar8x32_ps(t->fourth, at), _CMP_GT_OQ);
    at = _mm256_add_epi32(_mm256_add_epi32(at, at), _mm256_castps_si256(more));
    *minus = at;
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t->lower, at),
                            _mm256_permutevar8x32_ps(t->upper, at), half);
}

TARGET static int NAME(locate_tree)(const Search *s, const float *w, int n, uint16_t *index,
                                    float *near) {
    const NAME(Tree) tree = NAME(tree_of)(s);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i at;
        _mm256_storeu_ps(near + i, NAME(descend)(&tree, _mm256_loadu_ps(w + i), &at));
        if (index) {
            at = _mm256_sub_epi32(_mm256_setzero_si256(), at);
            _mm_storeu_si128((__m128i *)(index + i),
                             _mm_packus_epi32(_mm256_castsi256_si128(at),
                                              _mm256_extracti128_si256(at, 1)));
        }
    }
    return i;
}

/* The sums of nearest-2 for long rows of up to 16 values, two weights at a time.
 *
 * The indices of two neighbours make a number below 256. The pair of their distances is added to
 * that number's pair of sums, so that one addition in memory serves two weights.
 */
TARGET static int NAME(measure_pairs)(const Search *s, const float *w, int n, Pairs *pairs,
                                      double total[8]) {
    const NAME(Tree) tree = NAME(tree_of)(s);
    __m256d first = _mm256_loadu_pd(total), second = _mm256_loadu_pd(total + 4);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_loadu_ps(w + i);
        __m256i at;
        x = _mm256_sub_ps(x, NAME(descend)(&tree, x, &at));
        at = _mm256_sub_epi32(_mm256_setzero_si256(), at);
        at = _mm256_and_si256(_mm256_or_si256(at, _mm256_srli_epi64(at, 28)),
                              _mm256_set1_epi64x(255));
        uint64_t both[4];
        _mm256_storeu_si256((__m256i *)both, at);
        __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
        __m256d b = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
        first = _mm256_add_pd(first, _mm256_mul_pd(a, a));
        second = _mm256_add_pd(second, _mm256_mul_pd(b, b));
        double *to = pairs->sums[0][both[0]];
        _mm_storeu_pd(to, _mm_add_pd(_mm_loadu_pd(to), _mm256_castpd256_pd128(a)));
        to = pairs->sums[1][both[1]];
        _mm_storeu_pd(to, _mm_add_pd(_mm_loadu_pd(to), _mm256_extractf128_pd(a, 1)));
        to = pairs->sums[2][both[2]];
        _mm_storeu_pd(to, _mm_add_pd(_mm_loadu_pd(to), _mm256_castpd256_pd128(b)));
        to = pairs->sums[3][both[3]];
        _mm_storeu_pd(to, _mm_add_pd(_mm_loadu_pd(to), _mm256_extractf128_pd(b, 1)));
        for (int l = 0; l < 4; l++) pairs->counts[l][both[l]]++;
    }
    _mm256_storeu_pd(total, first);
    _mm256_storeu_pd(total + 4, second);
    return i;
}
#endif

/* The cell of each number on the search's even grid; a monotone function, NaN included. */
TARGET static void NAME(cells)(const Search *s, const float *w, int n, int32_t *cell) {
    float low = s->low, per_unit = s->per_unit, top = (float)(s->cells - 2);
    for (int i = 0; i < n; i++) {
        float at = (w[i] - low) * per_unit;
        at = at < top ? at : top;
        at = at > -1.0f ? at : -1.0f;
        cell[i] = (int32_t)(at + 1.0f);
    }
}

#if SIMD
/* As below by the grid, eight weights at a time: what is looked up is gathered. */
TARGET static int NAME(locate_grid)(const Search *s, const float *w, int n, uint16_t *index,
                                    float *near) {
    const __m256 low = _mm256_set1_ps(s->low), per_unit = _mm256_set1_ps(s->per_unit);
    const __m256 top = _mm256_set1_ps((float)(s->cells - 2)), under = _mm256_set1_ps(-1.0f);
    const __m256 one = _mm256_set1_ps(1.0f);
    const int most = s->most;
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_loadu_ps(w + i);
        __m256 at = _mm256_mul_ps(_mm256_sub_ps(x, low), per_unit);
        at = _mm256_max_ps(_mm256_min_ps(at, top), under); /* NaN becomes `top` */
        __m256i below = _mm256_i32gather_epi32(s->below, /* of the cell */
                                               _mm256_cvttps_epi32(_mm256_add_ps(at, one)), 4);
        for (int c = 0; c < most; c++) {
            __m256 bound = _mm256_i32gather_ps(s->boundaries, below, 4);
            __m256 more = _mm256_cmp_ps(x, bound, _CMP_GT_OQ);
            below = _mm256_sub_epi32(below, _mm256_castps_si256(more));
        }
        _mm256_storeu_ps(near + i, _mm256_i32gather_ps(s->codebook, below, 4));
        if (index)
            _mm_storeu_si128((__m128i *)(index + i),
                             _mm_packus_epi32(_mm256_castsi256_si128(below),
                                              _mm256_extracti128_si256(below, 1)));
    }
    return i;
}
#endif

/* Count the boundaries below each of `n` <= BLOCK weights, and look up their representative.
 * `index` is wanted or NULL. */
TARGET static void NAME(locate)(const Search *s, const float *w, int n, uint16_t *index,
                                float *near) {
    int start = 0;
    uint16_t own[BLOCK];
#if SIMD
    if (s->k <= TREE) start = NAME(locate_tree)(s, w, n, index, near);
    else if (s->cells) start = NAME(locate_grid)(s, w, n, index, near);
#endif
    if (start == n) return;
    if (!index) index = own;
    if (s->k <= TREE) {
        for (int i = start; i < n; i++) {
            int below = 0;
            for (int j = 0; j < s->k - 1; j++) below += w[i] > s->boundaries[j];
            index[i] = (uint16_t)below;
        }
    } else if (s->cells) {
        int32_t cell[BLOCK];
        NAME(cells)(s, w + start, n - start, cell);
        /* Held apart from `s`, which the stores below might change for all a compiler knows. */
        const int32_t *restrict table = s->below;
        const float *restrict bounds = s->boundaries;
        const int most = s->most;
        for (int i = start; i < n; i++) {
            int32_t below = table[cell[i - start]];
            below += w[i] > bounds[below];
            for (int c = 1; c < most; c++) below += w[i] > bounds[below];
            index[i] = (uint16_t)below;
        }
    } else {
        for (int i = 0; i < n; i++) {
            const float *base = s->boundaries;
            int64_t left = s->k - 1;
            for (; left > 1; left -= left / 2) base += base[left / 2 - 1] < w[i] ? left / 2 : 0;
            index[i] = (uint16_t)(base - s->boundaries + (left && *base < w[i]));
        }
    }
    const float *restrict codebook = s->codebook;
    for (int i = start; i < n; i++) near[i] = codebook[index[i]];
}

/* ---- sums ------------------------------------------------------------------------------- */

/* Add numbers, or their squares, to their clusters' sums and counts.
 *
 * Neighbours go to different lanes, so that an addition rarely waits for the one before it.
 */
TARGET static void NAME(scatter)(const float *values, const uint16_t *index, int n, int square,
                                 int lanes, Pair *sums) {
    int i = 0;
    if (!square)
        for (; i + 8 <= n; i += 8) {
#if SIMD
            const __m256d one = _mm256_set1_pd(1.0);
            for (int half = 0; half < 8; half += 4) {
                __m256d x = _mm256_cvtps_pd(_mm_loadu_ps(values + i + half));
                __m256d even = _mm256_unpacklo_pd(x, one), odd = _mm256_unpackhi_pd(x, one);
                const uint16_t *at = index + i + half;
                double *to[4];
                for (int l = 0; l < 4; l++)
                    to[l] = &sums[lanes * at[l] + ((half + l) & (lanes - 1))].sum;
                _mm_storeu_pd(to[0], _mm_add_pd(_mm_loadu_pd(to[0]), _mm256_castpd256_pd128(even)));
                _mm_storeu_pd(to[1], _mm_add_pd(_mm_loadu_pd(to[1]), _mm256_castpd256_pd128(odd)));
                _mm_storeu_pd(to[2],
                              _mm_add_pd(_mm_loadu_pd(to[2]), _mm256_extractf128_pd(even, 1)));
                _mm_storeu_pd(to[3],
                              _mm_add_pd(_mm_loadu_pd(to[3]), _mm256_extractf128_pd(odd, 1)));
            }
#else
            for (int l = 0; l < 8; l++) {
                Pair *to = sums + lanes * index[i + l] + (l & (lanes - 1));
                to->sum += (double)values[i + l];
                to->count += 1;
            }
#endif
        }
    for (; i < n; i++) {
        Pair *to = sums + (int64_t)lanes * index[i] + i % lanes;
        double value = values[i];
        to->sum += square ? value * value : value;
        to->count += 1;
    }
}

/* Replace `near` by what the cluster sums add, (w - c) or its sign, and return the penalty. */
TARGET static void NAME(distances)(const float *w, float *near, int n, int power,
                                   double total[8]) {
    int i = 0;
    for (; i < n; i++) near[i] = w[i] - near[i];
    i = 0;
    if (power == 2) {
#if SIMD
        __m256d first = _mm256_loadu_pd(total), second = _mm256_loadu_pd(total + 4);
        for (; i + 8 <= n; i += 8) {
            __m256d a = _mm256_cvtps_pd(_mm_loadu_ps(near + i));
            __m256d b = _mm256_cvtps_pd(_mm_loadu_ps(near + i + 4));
            first = _mm256_add_pd(first, _mm256_mul_pd(a, a));
            second = _mm256_add_pd(second, _mm256_mul_pd(b, b));
        }
        _mm256_storeu_pd(total, first);
        _mm256_storeu_pd(total + 4, second);
#endif
        for (; i < n; i++) total[i % 8] += (double)near[i] * near[i];
    } else {
        for (; i < n; i++) {
            total[i % 8] += fabsf(near[i]);
            near[i] = (float)((near[i] > 0) - (near[i] < 0));
        }
    }
}

/* The rest of `measure_pairs`, or all of it: the same sums by way of `index` and `near`. */
TARGET static void NAME(add_pairs)(const float *near, const uint16_t *index, int n,
                                   Pairs *pairs) {
    for (int i = 0; i < n; i += 2) {
        int lane = i / 2 % 4, last = i + 1 == n;
        int both = index[i] | (last ? 0 : index[i + 1] << 4);
        double *to = pairs->sums[lane][both];
        to[0] += (double)near[i];
        to[1] += last ? 0.0 : (double)near[i + 1];
        pairs->counts[lane][both]++;
        pairs->single += last;
    }
}

/* ---- what is done with a block ---------------------------------------------------------- */

TARGET static void NAME(pull)(const float *w, const float *near, int n, int power, float scale,
                              float *out) {
    if (power == 2)
        for (int i = 0; i < n; i++) out[i] += scale * (w[i] - near[i]);
    else
        for (int i = 0; i < n; i++) {
            float up = w[i] > near[i], down = w[i] < near[i];
            out[i] += scale * (up - down);
        }
}

TARGET static void NAME(move)(const float *w, const float *near, int n, int power, float amount,
                              float *out) {
    if (power == 2)
        for (int i = 0; i < n; i++) {
            float way = near[i] - w[i];
            out[i] = amount < 0.5f ? w[i] + amount * way : near[i] - way * (1.0f - amount);
        }
    else
        for (int i = 0; i < n; i++) {
            float away = w[i] - near[i];
            float left = away > 0 ? away - amount : away + amount; /* NaN stays NaN */
            out[i] = away >= -amount && away <= amount ? near[i] : near[i] + left;
        }
}

TARGET static void NAME(assign)(const uint16_t *index, int n, int64_t at, const Job *job) {
    if (job->out_type == UINT8)
        for (int i = 0; i < n; i++) ((uint8_t *)job->out)[at + i] = (uint8_t)index[i];
    else
        for (int i = 0; i < n; i++) ((int32_t *)job->out)[at + i] = index[i];
}

/* Run one operation over the weights `at` … `end` of one row, into `sums`. */
TARGET static void NAME(run)(int operation, const Job *job, const Search *s, int64_t at,
                             int64_t end, Sums *sums, double total[8]) {
    float weights[BLOCK], others[BLOCK], near[BLOCK];
    uint16_t index[BLOCK];
    int indexed = operation != PULL && operation != SNAP;
    for (int n; at < end; at += n) {
        n = end - at < BLOCK ? (int)(end - at) : BLOCK;
        const float *w = NAME(load)(job->weight, job->type, at, n, weights);
        int done = 0;
#if SIMD
        if (sums->pairs) done = NAME(measure_pairs)(s, w, n, sums->pairs, total);
        w += done;
#endif
        NAME(locate)(s, w, n - done, indexed ? index : NULL, near);
        switch (operation) {
        case MEASURE:
            NAME(distances)(w, near, n - done, job->power, total);
            if (sums->pairs) NAME(add_pairs)(near, index, n - done, sums->pairs);
            else NAME(scatter)(near, index, n, 0, sums->lanes, sums->single);
            break;
        case SUMS:
            NAME(scatter)(NAME(load)(job->out, job->out_type, at, n, others), index, n,
                          job->power == 2, sums->lanes, sums->single);
            break;
        case PULL:
            if (job->out_type == FLOAT32) {
                NAME(pull)(w, near, n, job->power, (float)job->amount, (float *)job->out + at);
            } else {
                NAME(load)(job->out, job->out_type, at, n, others);
                NAME(pull)(w, near, n, job->power, (float)job->amount, others);
                NAME(store)(job->out, job->out_type, at, n, others);
            }
            break;
        case MOVE:
            NAME(move)(w, near, n, job->power, (float)job->amount, others);
            NAME(store)(job->out, job->out_type, at, n, others);
            for (int i = 0; i < n; i++) others[i] -= near[i];
            NAME(scatter)(others, index, n, 0, sums->lanes, sums->single);
            break;
        case SNAP: NAME(store)(job->out, job->out_type, at, n, near); break;
        default: NAME(assign)(index, n, at, job);
        }
    }
}

/* Sum of the weights less the first one, and of the squares of that: 8 lanes each. */
TARGET static void NAME(moments)(const Job *job, int64_t at, int64_t end, double sum[8],
                                 double squares[8]) {
    float weights[BLOCK], zero[BLOCK];
    float first = *NAME(load)(job->weight, job->type, 0, 1, zero);
    for (int n; at < end; at += n) {
        n = end - at < BLOCK ? (int)(end - at) : BLOCK;
        const float *w = NAME(load)(job->weight, job->type, at, n, weights);
        int i = 0;
#if SIMD
        const __m256d shift = _mm256_set1_pd(first);
        __m256d sum_a = _mm256_loadu_pd(sum), sum_b = _mm256_loadu_pd(sum + 4);
        __m256d square_a = _mm256_loadu_pd(squares), square_b = _mm256_loadu_pd(squares + 4);
        for (; i + 8 <= n; i += 8) {
            __m256d a = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(w + i)), shift);
            __m256d b = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(w + i + 4)), shift);
            sum_a = _mm256_add_pd(sum_a, a);
            sum_b = _mm256_add_pd(sum_b, b);
            square_a = _mm256_add_pd(square_a, _mm256_mul_pd(a, a));
            square_b = _mm256_add_pd(square_b, _mm256_mul_pd(b, b));
        }
        _mm256_storeu_pd(sum, sum_a);
        _mm256_storeu_pd(sum + 4, sum_b);
        _mm256_storeu_pd(squares, square_a);
        _mm256_storeu_pd(squares + 4, square_b);
#endif
        for (; i < n; i++) {
            double away = (double)w[i] - first;
            sum[i % 8] += away;
            squares[i % 8] += away * away;
        }
    }
}
