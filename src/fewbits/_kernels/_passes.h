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

/* Count the boundaries below each of `n` <= BLOCK weights, and look up their representative.
 * `index` is wanted or NULL. */
TARGET static void NAME(locate)(const Search *s, const float *w, int n, uint16_t *index,
                                float *near) {
    int start = 0;
    uint16_t own[BLOCK];
#if SIMD
    start = locate_fast(s, w, n, index, near);
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
        const Cell *restrict grid = s->grid;
        const float *restrict bounds = s->boundaries;
        for (int i = start; i < n; i++) {
            const Cell *own = grid + cell[i - start];
            int32_t below = (own->below & ~CROWDED) + (w[i] > own->bound);
            if (own->below & CROWDED)
                while (w[i] > bounds[below]) below++;
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

/* Add numbers to the float32 sums by pairs of neighbours' indices, or by cluster. */
TARGET static void NAME(add_pairs)(const float *values, const uint16_t *index, int n, float *to) {
    for (int i = 0; i < n; i += 2) {
        float *sums = to + 8 * (index[i] | index[i + 1] << 4) + (i & 2) * 2;
        sums[0] += values[i];
        sums[1] += values[i + 1];
        sums[2] += 1;
    }
}

TARGET static void NAME(add_ones)(const float *values, const uint16_t *index, int n,
                                  const Sums *sums) {
    for (int i = 0; i < n; i++) {
        float *to = sums->narrow + 2 * (sums->lanes * index[i] + (i & (sums->lanes - 1)));
        to[0] += values[i];
        to[1] += 1;
    }
}

TARGET static void NAME(add_few)(const Search *s, const float *values, const uint16_t *index, int n,
                                 const Sums *sums) {
    Few few = {0};
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < n; i += 8)
            for (int l = 0; l < 8; l++) {
                few.sums[j][l] += only_if(index[i + l] == j, values[i + l]);
                few.counts[j][l] += index[i + l] >= j;
            }
    add_few(&few, s->k, sums);
}

/* Sum values of whole eights by cluster in float32. Without values, the distances; and their squares
 * by lane. */
TARGET static void NAME(add)(const Search *s, const float *w, const float *values, int n,
                             const Sums *sums, float squares[8]) {
    float near[BLOCK];
    uint16_t index[BLOCK];
#if SIMD
    if (values ? add_fast(s, w, values, n, sums) : measure_fast(s, w, n, sums, squares)) return;
#endif
    NAME(locate)(s, w, n, index, near);
    if (!values) {
        for (int i = 0; i < n; i++) near[i] = w[i] - near[i];
        for (int i = 0; i < n; i++) squares[i % 8] += near[i] * near[i];
        values = near;
    }
    if (sums->kind == FEW) NAME(add_few)(s, values, index, n, sums);
    else if (sums->kind == PAIRS) NAME(add_pairs)(values, index, n, sums->narrow);
    else NAME(add_ones)(values, index, n, sums);
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

/* Do with the whole eights of a block what there are fast passes for; return how many weights. */
TARGET static int NAME(eights)(int operation, const Job *job, const Search *s, const float *w,
                               int n, float *out, const Sums *sums, double total[8]) {
    int whole = n - n % 8;
    if (operation == ADD && sums->kind != EXACT) {
        NAME(add)(s, w, out, whole, sums, NULL);
        return whole;
    }
    if (operation == MEASURE && sums->kind != EXACT) {
        float squares[8] = {0}, all = 0;
        NAME(add)(s, w, NULL, whole, sums, squares);
        for (int l = 0; l < 8; l++) all += squares[l];
        if (all > 1e-25f && all < 1e30f) {
            for (int l = 0; l < 8; l++) total[l] += squares[l];
        } else { /* so small or large that float32 does not hold all squares */
            float near[BLOCK];
            NAME(locate)(s, w, whole, NULL, near);
            NAME(distances)(w, near, whole, 2, total);
        }
        return whole;
    }
#if SIMD
    if (operation == PULL && job->power == 2)
        return pull_fast(s, w, n, (float)job->amount, out);
#endif
    (void)job, (void)out;
    return 0;
}

/* Do the same, or anything else, with `n` <= BLOCK weights from `at` on. */
TARGET static void NAME(rest)(int operation, const Job *job, const Search *s, const float *w, int n,
                              float *out, int64_t at, const Sums *sums, double total[8]) {
    float own[BLOCK], moved[BLOCK], *near = operation == SNAP ? out : own;
    uint16_t index[BLOCK];
    NAME(locate)(s, w, n, operation == PULL || operation == SNAP ? NULL : index, near);
    switch (operation) {
    case SNAP: break;
    case PULL: NAME(pull)(w, near, n, job->power, (float)job->amount, out); break;
    case ASSIGN: NAME(assign)(index, n, at, job); break;
    case MOVE:
        NAME(move)(w, near, n, job->power, (float)job->amount, moved);
        NAME(store)(job->out, job->out_type, at, n, moved);
        for (int i = 0; i < n; i++) moved[i] -= near[i];
        NAME(scatter)(moved, index, n, 0, sums->lanes, sums->single);
        break;
    default:
        if (operation == MEASURE) NAME(distances)(w, out = near, n, job->power, total);
        NAME(scatter)(out, index, n, job->power == 2 && operation == SUMS, sums->lanes,
                      sums->single);
    }
}

/* Run one operation over the weights `at` … `end` of one row, into `sums`. */
TARGET static void NAME(run)(int operation, const Job *job, const Search *s, int64_t at,
                             int64_t end, const Sums *sums, double total[8]) {
    float weights[BLOCK], others[BLOCK];
    int read = operation == SUMS || operation == ADD || operation == PULL;
    int written = operation == SNAP || operation == PULL, blocks = 0;
    for (int n; at < end; at += n) {
        n = end - at < BLOCK ? (int)(end - at) : BLOCK;
        const float *w = NAME(load)(job->weight, job->type, at, n, weights);
        float *out = others; /* or in place */
        if ((read || written) && job->out_type == FLOAT32) out = (float *)job->out + at;
        else if (read) NAME(load)(job->out, job->out_type, at, n, others);
        int done = NAME(eights)(operation, job, s, w, n, out, sums, total);
        if (done < n)
            NAME(rest)(operation, job, s, w + done, n - done, out + done, at + done, sums, total);
        if (written && out == others) NAME(store)(job->out, job->out_type, at, n, others);
        if (++blocks % STRETCH == 0 || at + n == end) add_narrow(sums, s->k);
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
