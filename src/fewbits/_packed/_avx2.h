/* The kernels for processors with AVX2, included by _native.c.
 *
 * Eight indices of `width` bits take `width` bytes, so that elements in multiples of eight begin
 * with a byte. Indices up to 4 bits find their value in one or two registers, wider ones in a table
 * in L1. Loops are written once, for constant widths and batches that the compiler unrolls.
 */

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

/* Bytes from the first of eight indices that `eight_values` may touch. */
#define REACH 8

/* Bytes that packed indices are asked of memory in advance: rows follow each other without a gap,
 * which the processor does not see soon enough (0.76 ms instead of 0.88 for 4096 x 4096 int8). */
#define AHEAD 4096

typedef struct {
    __m256i shifts, mask;
    __m256 low, high; /* values 0 … 7 and 8 … 15 */
} Lookup;

INLINE Lookup lookup_for(const float *table, int width) {
    Lookup look;
    look.shifts = _mm256_setr_epi32(0, width, 2 * width, 3 * width, 4 * width, 5 * width,
                                    6 * width, 7 * width);
    look.mask = _mm256_set1_epi32((1 << width) - 1);
    float few[16] = {0};
    memcpy(few, table, (width < 4 ? 1 << width : 16) * sizeof(float));
    look.low = _mm256_loadu_ps(few);
    look.high = _mm256_loadu_ps(few + 8);
    return look;
}

/* Eight values of indices of up to 4 bits. */
INLINE __m256 eight_values(const uint8_t *data, int width, const Lookup *look) {
    int32_t bits;
    memcpy(&bits, data, 4);
    __m256i all = _mm256_srlv_epi32(_mm256_set1_epi32(bits), look->shifts);
    if (width < 3) all = _mm256_and_si256(all, look->mask); /* the permutation reads three bits */
    __m256 low = _mm256_permutevar8x32_ps(look->low, all);
    if (width < 4) return low;
    __m256 high = _mm256_permutevar8x32_ps(look->high, all);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(all, 28)));
}

INLINE void decode_few(const uint8_t *data, int64_t eights, int width, const float *table,
                       float *out) {
    Lookup look = lookup_for(table, width);
    for (int64_t i = 0; i < eights; i++)
        _mm256_storeu_ps(out + 8 * i, eight_values(data + i * width, width, &look));
}

/* Indices of more than 4 bits, singly: a gather takes twice the time. */
INLINE void decode_many(const uint8_t *data, int64_t eights, int width, const float *table,
                        float *out) {
    for (int64_t i = 0; i < eights; i++) {
        uint64_t bits;
        memcpy(&bits, data + i * width, 8);
        for (int j = 0; j < 8; j++)
            out[8 * i + j] = table[bits >> (j * width) & ((1u << width) - 1)];
    }
}

TARGET static void decode_eights(const uint8_t *data, int64_t eights, int width,
                                 const float *table, float *out) {
    switch (width) {
    case 1: decode_few(data, eights, 1, table, out); break;
    case 2: decode_few(data, eights, 2, table, out); break;
    case 3: decode_few(data, eights, 3, table, out); break;
    case 4: decode_few(data, eights, 4, table, out); break;
    case 5: decode_many(data, eights, 5, table, out); break;
    case 6: decode_many(data, eights, 6, table, out); break;
    case 7: decode_many(data, eights, 7, table, out); break;
    case 8: decode_many(data, eights, 8, table, out); break;
    }
}

INLINE float sum_of(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

/* Add to sums[b] the products of `eights` x 8 weights with each input, `stride` floats apart.
 * Without a `width` the weights are floats. */
INLINE void dot_of(const uint8_t *data, int64_t eights, int width, int batch, const float *table,
                   const float *input, int64_t stride, float *sums) {
    int lanes = batch == 1 ? 4 : batch == 2 ? 2 : 1; /* sums in flight for each input */
    __m256 total[8];
    Lookup look;
    if (width) look = lookup_for(table, width);
    for (int j = 0; j < lanes * batch; j++) total[j] = _mm256_setzero_ps();
    for (int64_t i = 0; i < eights; i += lanes)
        for (int l = 0; l < lanes && i + l < eights; l++) {
            __m256 values = width ? eight_values(data + (i + l) * width, width, &look)
                                  : _mm256_loadu_ps(table + 8 * (i + l));
            for (int b = 0; b < batch; b++) {
                const float *x = input + b * stride + 8 * (i + l);
                int to = l * batch + b;
                total[to] = _mm256_fmadd_ps(values, _mm256_loadu_ps(x), total[to]);
            }
        }
    for (int b = 0; b < batch; b++) {
        for (int l = 1; l < lanes; l++) total[b] = _mm256_add_ps(total[b], total[l * batch + b]);
        sums[b] += sum_of(total[b]);
    }
}

#define DOT_BATCHES(width)                                                                       \
    switch (batch) {                                                                             \
    case 1: dot_of(data, eights, width, 1, table, input, stride, sums); break;                   \
    case 2: dot_of(data, eights, width, 2, table, input, stride, sums); break;                   \
    case 4: dot_of(data, eights, width, 4, table, input, stride, sums); break;                   \
    case 8: dot_of(data, eights, width, 8, table, input, stride, sums); break;                   \
    }                                                                                            \
    break

TARGET static void dot_eights(const uint8_t *data, int64_t eights, int width, int batch,
                              const float *table, const float *input, int64_t stride,
                              float *sums) {
    switch (width) {
    case 0: DOT_BATCHES(0);
    case 1: DOT_BATCHES(1);
    case 2: DOT_BATCHES(2);
    case 3: DOT_BATCHES(3);
    case 4: DOT_BATCHES(4);
    default: /* through values in L1 */
        for (int64_t at = 0; at < eights; at += 64) {
            float values[512];
            int64_t some = eights - at < 64 ? eights - at : 64;
            decode_eights(data + at * width, some, width, table, values);
            dot_eights(NULL, some, 0, batch, values, input + 8 * at, stride, sums);
        }
    }
}

/* ---- four bits ---------------------------------------------------------------------------- */

/* Byte shuffles look up 32 indices at a time, one byte of their values after the other, in fewer
 * instructions than permutations of floats: 12 shuffles for 32 values instead of 8 permutations of
 * two, 4 variable shifts and 4 blends. The values come in the order of `nibble_element`. */

typedef struct {
    __m256i bytes[4]; /* byte i of each of 16 values, in both halves */
} Bytes;

TARGET static Bytes bytes_of(const float *table) {
    Bytes result;
    for (int i = 0; i < 4; i++) {
        uint8_t byte[16];
        for (int j = 0; j < 16; j++) byte[j] = ((const uint8_t *)(table + j))[i];
        result.bytes[i] =
            _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)byte));
    }
    return result;
}

INLINE void values_of(__m256i indices, const Bytes *look, __m256 *values) {
    __m256i p0 = _mm256_shuffle_epi8(look->bytes[0], indices);
    __m256i p1 = _mm256_shuffle_epi8(look->bytes[1], indices);
    __m256i p2 = _mm256_shuffle_epi8(look->bytes[2], indices);
    __m256i p3 = _mm256_shuffle_epi8(look->bytes[3], indices);
    __m256i low = _mm256_unpacklo_epi8(p0, p1), low_top = _mm256_unpacklo_epi8(p2, p3);
    __m256i high = _mm256_unpackhi_epi8(p0, p1), high_top = _mm256_unpackhi_epi8(p2, p3);
    values[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, low_top));
    values[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, low_top));
    values[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high, high_top));
    values[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high, high_top));
}

/* Add to sums[b] the products of blocks of 64 weights with each arranged input. */
INLINE void dot_nibbles_of(const uint8_t *data, int64_t blocks, int batch, const Bytes *look,
                           const float *input, int64_t stride, float *sums) {
    int lanes = batch == 1 ? 4 : batch == 2 ? 2 : 1; /* sums in flight for each input */
    __m256 total[8], values[4];
    __m256i mask = _mm256_set1_epi8(15);
    for (int j = 0; j < lanes * batch; j++) total[j] = _mm256_setzero_ps();
    for (int64_t i = 0; i < blocks; i++) {
        _mm_prefetch((const char *)(data + 32 * i + AHEAD), _MM_HINT_T0);
        __m256i both = _mm256_loadu_si256((const __m256i *)(data + 32 * i));
        for (int half = 0; half < 2; half++) {
            __m256i indices = half ? _mm256_srli_epi16(both, 4) : both;
            values_of(_mm256_and_si256(indices, mask), look, values);
            for (int b = 0; b < batch; b++)
                for (int f = 0; f < 4; f++) {
                    const float *x = input + b * stride + 64 * i + 32 * half + 8 * f;
                    int to = f % lanes * batch + b;
                    total[to] = _mm256_fmadd_ps(values[f], _mm256_loadu_ps(x), total[to]);
                }
        }
    }
    for (int b = 0; b < batch; b++) {
        for (int l = 1; l < lanes; l++) total[b] = _mm256_add_ps(total[b], total[l * batch + b]);
        sums[b] += sum_of(total[b]);
    }
}

TARGET static void dot_nibbles(const uint8_t *data, int64_t blocks, int batch,
                               const float *table, const float *input, int64_t stride,
                               float *sums) {
    Bytes look = bytes_of(table);
    switch (batch) {
    case 1: dot_nibbles_of(data, blocks, 1, &look, input, stride, sums); break;
    case 2: dot_nibbles_of(data, blocks, 2, &look, input, stride, sums); break;
    case 4: dot_nibbles_of(data, blocks, 4, &look, input, stride, sums); break;
    case 8: dot_nibbles_of(data, blocks, 8, &look, input, stride, sums); break;
    }
}

/* ---- eight-bit values and inputs ---------------------------------------------------------- */

/* Write a row on 255 levels; return the step between them, which is not finite where the row is
 * not. */
TARGET static float row_to_bytes(const float *values, int64_t count, int8_t *out) {
    __m256 most = _mm256_setzero_ps(), clear = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    float all[8], largest = 0;
    int64_t i = 0;
    int finite = 1;
    for (; i + 8 <= count; i += 8) {
        __m256 v = _mm256_and_ps(_mm256_loadu_ps(values + i), clear);
        /* A NaN is seen in the comparison, an infinity in the largest. */
        finite &= !_mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        most = _mm256_max_ps(most, v);
    }
    _mm256_storeu_ps(all, most);
    for (int j = 0; j < 8; j++) largest = all[j] > largest ? all[j] : largest;
    for (; i < count; i++) {
        finite &= values[i] == values[i];
        largest = fabsf(values[i]) > largest ? fabsf(values[i]) : largest;
    }
    if (!finite || largest > 3.4028235e38f) {
        memset(out, 0, count);
        return finite ? INFINITY : NAN;
    }
    float step = largest / 127, divisor = step > 0 ? step : 1;
    __m256 by = _mm256_set1_ps(divisor);
    for (i = 0; i + 8 <= count; i += 8) { /* to the nearest, ties to even */
        __m256i whole = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(values + i), by));
        __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(whole),
                                         _mm256_extracti128_si256(whole, 1));
        _mm_storel_epi64((__m128i *)(out + i), _mm_packs_epi16(shorts, shorts));
    }
    for (; i < count; i++) {
        __m128 quotient = _mm_div_ss(_mm_set_ss(values[i]), _mm_set_ss(divisor));
        out[i] = (int8_t)_mm_cvtss_si32(quotient);
    }
    return step;
}

/* Byte p of the planes that a block of packed indices is cut into; see `plane_element`. */
INLINE void planes_of(const uint8_t *data, int width, __m256i *planes) {
    __m256i mask = _mm256_set1_epi8((char)((1 << width) - 1));
    if (width == 3) { /* three bytes, eight indices, to each 32 bits; then three bits to each 8 */
        __m256i all = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)data)),
            _mm_loadu_si128((const __m128i *)(data + 12)), 1);
        __m256i spread = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
        all = _mm256_shuffle_epi8(all, spread);
        for (int plane = 0; plane < 2; plane++) {
            __m256i v = plane ? _mm256_srli_epi32(all, 12) : all;
            __m256i even = _mm256_and_si256(v, _mm256_set1_epi32(7));
            even = _mm256_or_si256(
                even, _mm256_and_si256(_mm256_slli_epi32(v, 10), _mm256_set1_epi32(0x70000)));
            __m256i odd = _mm256_and_si256(_mm256_slli_epi32(v, 5), _mm256_set1_epi32(0x700));
            odd = _mm256_or_si256(
                odd, _mm256_and_si256(_mm256_slli_epi32(v, 15), _mm256_set1_epi32(0x7000000)));
            planes[plane] = _mm256_or_si256(even, odd);
        }
        return;
    }
    __m256i all = _mm256_loadu_si256((const __m256i *)data);
    for (int plane = 0; plane < 8 / width; plane++)
        planes[plane] = _mm256_and_si256(_mm256_srli_epi16(all, plane * width), mask);
}

/* Add to sums[r * batch + b] the products of row r's bytes of one block with each input's planes. */
INLINE void dot_block_of(const uint8_t *const *data, int width, int rows, int batch,
                         const __m256i *tables, const int8_t *input, int64_t stride,
                         __m256i *sums) {
    __m256i planes[2][8], ones = _mm256_set1_epi16(1);
    for (int r = 0; r < rows; r++) planes_of(data[r], width, planes[r]);
    for (int plane = 0; plane < PLANES(width); plane++)
        for (int r = 0; r < rows; r++) {
            __m256i values = _mm256_shuffle_epi8(tables[r], planes[r][plane]);
            for (int b = 0; b < batch; b++) {
                __m256i x = _mm256_loadu_si256((const __m256i *)(input + b * stride + 32 * plane));
                /* |x| times the value with the sign of x: at most 2 x 127 x 127 in 16 bits. */
                __m256i with_sign = _mm256_sign_epi8(values, x);
                __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), with_sign);
                __m256i *sum = sums + r * batch + b;
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
}

/* One row, or for a single input two: they share its loads and magnitudes. */
INLINE void dot_bytes_of(const uint8_t *data, const uint8_t *end, int64_t pitch, int64_t blocks,
                         int width, int rows, int batch, const int8_t *tables,
                         const int8_t *input, int64_t stride, int32_t *sums) {
    __m256i total[MOST_BYTE_INPUTS], looks[2];
    const uint8_t *at[2];
    int64_t size = BLOCK_BYTES(width), step = 32 * PLANES(width), i = 0;
    for (int r = 0; r < rows; r++) {
        at[r] = data + r * pitch;
        looks[r] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)tables + r));
    }
    for (int j = 0; j < rows * batch; j++) total[j] = _mm256_setzero_si256();
    for (; i < blocks && at[rows - 1] + 32 <= end; i++) {
        for (int r = 0; r < rows; r++)
            _mm_prefetch((const char *)(at[r] + AHEAD), _MM_HINT_T0);
        dot_block_of(at, width, rows, batch, looks, input + i * step, stride, total);
        for (int r = 0; r < rows; r++) at[r] += size;
    }
    for (; i < blocks; i++) { /* the last of all: what lies behind it is not ours */
        uint8_t copies[2][32] = {{0}};
        const uint8_t *copied[2] = {copies[0], copies[1]};
        for (int r = 0; r < rows; r++) {
            if (at[r] < end) memcpy(copies[r], at[r], end - at[r] < 32 ? end - at[r] : 32);
            at[r] += size;
        }
        dot_block_of(copied, width, rows, batch, looks, input + i * step, stride, total);
    }
    for (int j = 0; j < rows * batch; j++) {
        int32_t lanes[8];
        _mm256_storeu_si256((__m256i *)lanes, total[j]);
        sums[j] = 0;
        for (int l = 0; l < 8; l++) sums[j] += lanes[l];
    }
}

#define DOT_BYTES_OF(width, rows, batch)                                                         \
    dot_bytes_of(data, end, pitch, blocks, width, rows, batch, tables, input, stride, sums);     \
    break
#define DOT_BYTES(width)                                                                         \
    switch (rows * 8 + batch) {                                                                  \
    case 17: DOT_BYTES_OF(width, 2, 1);                                                          \
    case 9: DOT_BYTES_OF(width, 1, 1);                                                           \
    case 10: DOT_BYTES_OF(width, 1, 2);                                                          \
    case 12: DOT_BYTES_OF(width, 1, 4);                                                          \
    }                                                                                            \
    break

/* The sums of `rows` (2 for one input, else 1) rows `pitch` bytes apart, by rows and inputs; each
 * row has a table of 16 values. */
TARGET static void dot_bytes(const uint8_t *data, const uint8_t *end, int64_t pitch,
                             int64_t blocks, int width, int rows, int batch,
                             const int8_t *tables, const int8_t *input, int64_t stride,
                             int32_t *sums) {
    switch (width) {
    case 1: DOT_BYTES(1);
    case 2: DOT_BYTES(2);
    case 3: DOT_BYTES(3);
    case 4: DOT_BYTES(4);
    }
}
