/* Products of packed rows with many inputs, for processors with AVX2; included by _native.c.
 *
 * Inputs lie in panels of 16 side by side, and six rows are multiplied with a panel at a time: their
 * 12 sums stay in registers. Indices are unpacked to bytes, a piece of the six rows at a time; each
 * weight is spread from its table straight into a register, so that no value is ever written down.
 */

#define PANEL 16 /* inputs: two registers */
#define TALL 6   /* rows: with two sums each, two inputs and a weight they fill 15 of 16 registers */
#define DEEP 512 /* indices of each row that are unpacked at a time, a multiple of 32 */

/* Eight indices of up to 8 bits. Four take at most 32 bits, from a byte or the middle of one on. */
INLINE __m256i eight_indices(const uint8_t *data, int width) {
    int32_t low, high;
    memcpy(&low, data, 4);
    memcpy(&high, data + width / 2, 4);
    int more = width % 2 * 4;
    __m256i shifts = _mm256_setr_epi32(0, width, 2 * width, 3 * width, more, more + width,
                                       more + 2 * width, more + 3 * width);
    __m256i all = _mm256_set_m128i(_mm_set1_epi32(high), _mm_set1_epi32(low));
    return _mm256_and_si256(_mm256_srlv_epi32(all, shifts), _mm256_set1_epi32((1 << width) - 1));
}

/* Write `count` x 32 indices as bytes. */
INLINE void unpack_of(const uint8_t *data, int64_t count, int width, uint8_t *out) {
    __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* packing goes by halves */
    for (int64_t i = 0; i < count; i++, data += 4 * width, out += 32) {
        __m256i first = _mm256_packus_epi32(eight_indices(data, width),
                                            eight_indices(data + width, width));
        __m256i last = _mm256_packus_epi32(eight_indices(data + 2 * width, width),
                                           eight_indices(data + 3 * width, width));
        __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, last), order);
        _mm256_storeu_si256((__m256i *)out, bytes);
    }
}

TARGET static void unpack_many(const uint8_t *data, int64_t count, int width, uint8_t *out) {
    switch (width) {
    case 1: unpack_of(data, count, 1, out); break;
    case 2: unpack_of(data, count, 2, out); break;
    case 3: unpack_of(data, count, 3, out); break;
    case 4: unpack_of(data, count, 4, out); break;
    case 5: unpack_of(data, count, 5, out); break;
    case 6: unpack_of(data, count, 6, out); break;
    case 7: unpack_of(data, count, 7, out); break;
    case 8: memcpy(out, data, 32 * count); break;
    }
}

/* Write the indices from `start` to before `stop` as bytes. */
static void unpack_run(const Weight *w, int64_t start, int64_t stop, uint8_t *out) {
    int64_t at = start;
    for (; at < stop && at % 8; at++) out[at - start] = (uint8_t)index_at(w, at);
    const uint8_t *data = w->data + at / 8 * w->width;
    int64_t many = (stop - at) / 32, safe = (w->end - data - REACH) / (4 * w->width);
    if (many > safe) many = safe;
    if (many > 0) {
        unpack_many(data, many, w->width, out + (at - start));
        at += 32 * many;
    }
    for (; at < stop; at++) out[at - start] = (uint8_t)index_at(w, at);
}

#define EACH_ROW(what) what(0) what(1) what(2) what(3) what(4) what(5)
#define LOAD(r)                                                                                  \
    __m256 first##r = _mm256_loadu_ps(sums + PANEL * r);                                         \
    __m256 second##r = _mm256_loadu_ps(sums + PANEL * r + 8);
#define MULTIPLY(r)                                                                              \
    value = _mm256_broadcast_ss(tables + r * apart + indices[DEEP * r + i]);                     \
    first##r = _mm256_fmadd_ps(value, x, first##r);                                              \
    second##r = _mm256_fmadd_ps(value, y, second##r);
#define STORE(r)                                                                                 \
    _mm256_storeu_ps(sums + PANEL * r, first##r);                                                \
    _mm256_storeu_ps(sums + PANEL * r + 8, second##r);

/* Add to six sums for each input of a panel; `apart` floats lie between the rows' tables. The sums
 * have names: an array of them would be written to memory at every step. */
INLINE void panel_of(const uint8_t *indices, int64_t count, const float *tables, int apart,
                     const float *panel, float *sums) {
    EACH_ROW(LOAD)
    for (int64_t i = 0; i < count; i++) {
        __m256 x = _mm256_loadu_ps(panel + PANEL * i), y = _mm256_loadu_ps(panel + PANEL * i + 8);
        __m256 value;
        EACH_ROW(MULTIPLY)
    }
    EACH_ROW(STORE)
}

TARGET static void panel_shared(const uint8_t *indices, int64_t count, const float *tables,
                                const float *panel, float *sums) {
    panel_of(indices, count, tables, 0, panel, sums);
}

TARGET static void panel_apart(const uint8_t *indices, int64_t count, const float *tables,
                               const float *panel, float *sums) {
    panel_of(indices, count, tables, 256, panel, sums);
}

/* Write rows `row` to before `stop`, at most six, times all panels: out is (rows, inputs). */
static void panel_rows(const Weight *w, int64_t columns, int64_t row, int64_t stop,
                       const float *panels, int64_t inputs, float *tables, float *sums,
                       float *out) {
    uint8_t indices[TALL * DEEP] = {0};
    int64_t count = (inputs + PANEL - 1) / PANEL;
    memset(sums, 0, count * TALL * PANEL * sizeof(float));
    for (int64_t r = row; r < stop && w->groups > 1; r++)
        fill_table(w, r * columns, 4, (char *)(tables + 256 * (r - row)));
    for (int64_t at = 0; at < columns; at += DEEP) {
        int64_t deep = columns - at < DEEP ? columns - at : DEEP;
        for (int64_t r = row; r < stop; r++)
            unpack_run(w, r * columns + at, r * columns + at + deep, indices + DEEP * (r - row));
        for (int64_t p = 0; p < count; p++)
            (w->groups > 1 ? panel_apart : panel_shared)(
                indices, deep, tables, panels + PANEL * (p * columns + at),
                sums + p * TALL * PANEL);
    }
    for (int64_t r = row; r < stop; r++)
        for (int64_t p = 0; p < count; p++) {
            int64_t some = inputs - p * PANEL < PANEL ? inputs - p * PANEL : PANEL;
            memcpy(out + r * inputs + p * PANEL, sums + PANEL * (p * TALL + r - row),
                   some * sizeof(float));
        }
}

/* products(data, bytes, codebook, width, k, groups, run, panels, inputs, columns, out, first,
 * last): rows `first` to before `last` of a weight with one codebook or several along its rows
 * times panels (ceil(inputs / 16), columns, 16), all float32; out is (rows, inputs). */
static PyObject *products(PyObject *self, PyObject *args) {
    unsigned long long data, codebook, panels, out;
    Py_ssize_t bytes, inputs, columns, first, last;
    float tables[TALL * 256] = {0};
    Weight w;
    if (!PyArg_ParseTuple(args, "KnKinnnKnnKnn", &data, &bytes, &codebook, &w.width, &w.k,
                          &w.groups, &w.run, &panels, &inputs, &columns, &out, &first, &last))
        return NULL;
    w.data = (const uint8_t *)(uintptr_t)data;
    w.end = w.data + bytes;
    w.codebook = (const char *)(uintptr_t)codebook;
    float *sums = malloc((inputs + PANEL - 1) / PANEL * TALL * PANEL * sizeof(float));
    if (!sums) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    if (w.groups == 1) fill_table(&w, 0, 4, (char *)tables);
    for (int64_t row = first; row < last; row += TALL)
        panel_rows(&w, columns, row, row + TALL < last ? row + TALL : last,
                   (const float *)(uintptr_t)panels, inputs, tables, sums,
                   (float *)(uintptr_t)out);
    Py_END_ALLOW_THREADS
    free(sums);
    Py_RETURN_NONE;
}

/* patches(input, images, channels, height, width, kernel, kernel, stride, stride, dilation,
 * dilation, rows, columns, out): what each of rows x columns positions of a convolution reads of
 * padded images, as panels for `products`; places behind the last position repeat another. */
static PyObject *patches(PyObject *self, PyObject *args) {
    unsigned long long input, out;
    Py_ssize_t images, channels, height, width, tall, wide, down, right, low, far, rows, columns;
    if (!PyArg_ParseTuple(args, "KnnnnnnnnnnnnK", &input, &images, &channels, &height, &width,
                          &tall, &wide, &down, &right, &low, &far, &rows, &columns, &out))
        return NULL;
    float *to = (float *)(uintptr_t)out;
    int64_t count = images * rows * columns;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t at = 0; at < count; at += PANEL) {
        const float *from[PANEL];
        for (int64_t j = 0; j < PANEL; j++) {
            int64_t i = at + j < count ? at + j : at, row = i / columns % rows;
            from[j] = (const float *)(uintptr_t)input +
                      i / columns / rows * channels * height * width + row * down * width +
                      i % columns * right;
        }
        for (int64_t c = 0; c < channels; c++)
            for (int64_t y = 0; y < tall; y++)
                for (int64_t x = 0; x < wide; x++, to += PANEL)
                    for (int64_t j = 0; j < PANEL; j++)
                        to[j] = from[j][(c * height + y * low) * width + x * far];
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
