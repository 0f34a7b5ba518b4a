/* Compiled twin of _eager.py; called by _cpu.py, which answers for addresses and sizes.
 *
 * The loops run without the GIL. Indices are never trusted: a table has a value for every pattern
 * of bits.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) && defined(__x86_64__)
#define HAS_AVX2 1
#include <immintrin.h>
#else
#define HAS_AVX2 0
#endif

#include "../_kernels/_processor.h"

#define MOST_INPUTS 8      /* of one pass over a row's indices */
#define MOST_BYTE_INPUTS 4 /* of the same with eight-bit arithmetic */
#define MOST_ROUNDED 256   /* inputs that are held rounded at a time */

/* For eight-bit arithmetic a row's indices are cut into blocks, a block into planes of 32. */
#define PLANES(width) ((width) == 3 ? 2 : 8 / (width))
#define BLOCK_BYTES(width) ((width) == 3 ? 24 : 32)

#if HAS_AVX2
#include "_avx2.h"
#endif

/* A packed weight. */
typedef struct {
    const uint8_t *data, *end;
    const char *codebook; /* (groups, k) */
    int width;
    Py_ssize_t k, groups, run; /* `run` elements after each other share a codebook */
} Weight;

static int simd = 0;

static inline uint32_t index_at(const Weight *w, int64_t element) {
    int64_t bit = element * w->width;
    const uint8_t *at = w->data + bit / 8;
    uint32_t held = 0; /* 16 bits and a shift of 7 reach into a third byte */
    for (int i = 0; i < 3 && at + i < w->end; i++) held |= (uint32_t)at[i] << (8 * i);
    return held >> (bit % 8) & ((1u << w->width) - 1);
}

/* Copy the codebook of an element's group into a table with a value for each pattern of bits. */
static void fill_table(const Weight *w, int64_t element, int size, char *table) {
    int64_t group = element / w->run % w->groups;
    int64_t have = w->k * size, all = ((int64_t)1 << w->width) * size;
    memcpy(table, w->codebook + group * have, have);
    memset(table + have, 0, all - have);
}

/* ---- decoding ----------------------------------------------------------------------------- */

#define DECODE(type)                                                                             \
    for (; at < stop; at++) ((type *)out)[at - start] = ((const type *)table)[index_at(w, at)]

/* Write the values of elements that share a codebook. */
static void decode_run(const Weight *w, int size, const char *table, int64_t start, int64_t stop,
                       char *out) {
    int64_t at = start;
#if HAS_AVX2
    if (simd && size == 4 && w->width >= 1 && w->width <= 8) {
        for (; at < stop && at % 8; at++)
            ((uint32_t *)out)[at - start] = ((const uint32_t *)table)[index_at(w, at)];
        const uint8_t *data = w->data + at / 8 * w->width;
        int64_t eights = (stop - at) / 8, safe = (w->end - data - REACH) / w->width;
        if (eights > safe) eights = safe;
        if (eights > 0) {
            decode_eights(data, eights, w->width, (const float *)table,
                          (float *)out + (at - start));
            at += 8 * eights;
        }
    }
#endif
    switch (size) {
    case 1: DECODE(uint8_t); break;
    case 2: DECODE(uint16_t); break;
    case 4: DECODE(uint32_t); break;
    case 8: DECODE(uint64_t); break;
    }
}

/* decode(data, bytes, codebook, width, k, groups, run, size, start, stop, out) */
static PyObject *decode(PyObject *self, PyObject *args) {
    unsigned long long data, codebook, out;
    Py_ssize_t bytes;
    long long start, stop;
    int size;
    Weight w;
    if (!PyArg_ParseTuple(args, "KnKinnniLLK", &data, &bytes, &codebook, &w.width, &w.k,
                          &w.groups, &w.run, &size, &start, &stop, &out))
        return NULL;
    w.data = (const uint8_t *)(uintptr_t)data;
    w.end = w.data + bytes;
    w.codebook = (const char *)(uintptr_t)codebook;
    char *table = malloc(((size_t)1 << w.width) * 8), *to = (char *)(uintptr_t)out;
    if (!table) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (int64_t at = start; at < stop;) {
        int64_t end = (at / w.run + 1) * w.run;
        if (end > stop) end = stop;
        if (at == start || w.groups > 1) fill_table(&w, at, size, table);
        if (w.groups == 1) end = stop;
        decode_run(&w, size, table, at, end, to + (at - start) * size);
        at = end;
    }
    Py_END_ALLOW_THREADS
    free(table);
    Py_RETURN_NONE;
}

/* ---- products ----------------------------------------------------------------------------- */

#if HAS_AVX2

/* Add to sums[b] the products of elements that share a codebook with each input. */
static void dot_run(const Weight *w, const float *table, int64_t start, int64_t stop, int batch,
                    const float *input, int64_t stride, float *sums) {
    int64_t at = start;
    for (; at < stop && at % 8; at++)
        for (int b = 0; b < batch; b++)
            sums[b] += table[index_at(w, at)] * input[b * stride + at - start];
    const uint8_t *data = w->data + at / 8 * w->width;
    int64_t eights = (stop - at) / 8, safe = (w->end - data - REACH) / w->width;
    if (eights > safe) eights = safe;
    if (eights > 0) {
        dot_eights(data, eights, w->width, batch, table, input + (at - start), stride, sums);
        at += 8 * eights;
    }
    for (; at < stop; at++)
        for (int b = 0; b < batch; b++)
            sums[b] += table[index_at(w, at)] * input[b * stride + at - start];
}

static int power_of_two_below(int64_t count, int most) {
    while (most > count) most /= 2;
    return most;
}

/* Which element of its block of 64 float `at` of an arranged input is; see `dot_nibbles`. */
static int64_t nibble_element(int64_t at) {
    int64_t half = at / 32, part = at % 32 / 8, lane = at % 8;
    return 2 * (4 * part + lane % 4 + 16 * (lane / 4)) + half;
}

/* arrange_floats(input, batch, columns, out): whole blocks in the order of `nibble_element`. */
static PyObject *arrange_floats(PyObject *self, PyObject *args) {
    unsigned long long input, out;
    Py_ssize_t batch, columns;
    int64_t from[64];
    if (!PyArg_ParseTuple(args, "KnnK", &input, &batch, &columns, &out)) return NULL;
    const float *x = (const float *)(uintptr_t)input;
    float *y = (float *)(uintptr_t)out;
    for (int i = 0; i < 64; i++) from[i] = nibble_element(i);
    Py_BEGIN_ALLOW_THREADS
    for (int64_t b = 0; b < batch; b++)
        for (int64_t at = b * columns; at + 64 <= (b + 1) * columns; at += 64)
            for (int i = 0; i < 64; i++) y[at + i] = x[at + from[i]];
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* linear(data, bytes, codebook, width, k, groups, run, input, arranged, batch, columns, out, rows,
 * first, last): the outputs `first` to before `last`, all float32; out is (batch, rows). With
 * `arranged` inputs, indices have four bits, rows begin with a byte and have one codebook. */
static PyObject *linear(PyObject *self, PyObject *args) {
    unsigned long long data, codebook, input, arranged, out;
    Py_ssize_t bytes, batch, columns, rows, first, last;
    float table[256];
    Weight w;
    if (!PyArg_ParseTuple(args, "KnKinnnKKnnKnnn", &data, &bytes, &codebook, &w.width, &w.k,
                          &w.groups, &w.run, &input, &arranged, &batch, &columns, &out, &rows,
                          &first, &last))
        return NULL;
    int64_t blocks = arranged ? columns / 64 : 0;
    const float *blocked = (const float *)(uintptr_t)arranged;
    w.data = (const uint8_t *)(uintptr_t)data;
    w.end = w.data + bytes;
    w.codebook = (const char *)(uintptr_t)codebook;
    const float *x = (const float *)(uintptr_t)input;
    float *y = (float *)(uintptr_t)out;
    Py_BEGIN_ALLOW_THREADS
    fill_table(&w, first * columns, 4, (char *)table);
    for (int64_t row = first; row < last; row++)
        for (int64_t b = 0; b < batch;) {
            int some = power_of_two_below(batch - b, MOST_INPUTS);
            float sums[MOST_INPUTS] = {0};
            int64_t at = row * columns, stop = at + columns;
            if (blocks) {
                if (w.groups > 1) fill_table(&w, at, 4, (char *)table);
                dot_nibbles(w.data + at / 2, blocks, some, table, blocked + b * columns, columns,
                            sums);
                at += 64 * blocks;
            }
            while (at < stop) {
                int64_t end = w.groups == 1 ? stop : (at / w.run + 1) * w.run;
                if (end > stop) end = stop;
                if (w.groups > 1) fill_table(&w, at, 4, (char *)table);
                dot_run(&w, table, at, end, some, x + b * columns + at - row * columns, columns,
                        sums);
                at = end;
            }
            for (int i = 0; i < some; i++, b++) y[b * rows + row] = sums[i];
        }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

#include "_panels.h"

/* Which element of its block byte `byte` of plane `plane` is. */
static int64_t plane_element(int width, int64_t plane, int64_t byte) {
    if (width == 3) return byte / 4 * 8 + 4 * plane + byte % 4;
    return byte * (8 / width) + plane;
}

/* Eight-bit inputs and codebooks, and what their integers are to be multiplied by. */
typedef struct {
    int8_t *row, *inputs, *tables; /* one row; rows of planes, padded by zeros; 16 values a group */
    float *factors, *steps;
    int64_t padded;
} Rounded;

static void round_inputs(const Rounded *to, const float *x, int64_t batch, int64_t columns,
                         int width) {
    int64_t block = 32 * PLANES(width), from[256];
    for (int64_t i = 0; i < block; i++) from[i] = plane_element(width, i / 32, i % 32);
    for (int64_t b = 0; b < batch; b++) {
        int8_t *out = to->inputs + b * to->padded;
        to->factors[b] = row_to_bytes(x + b * columns, columns, to->row);
        memset(to->row + columns, 0, to->padded - columns);
        for (int64_t at = 0; at < to->padded; at += block)
            for (int64_t i = 0; i < block; i++) out[at + i] = to->row[at + from[i]];
    }
}

/* The outputs `first` to before `last` of up to MOST_ROUNDED inputs. */
static void dot_rounded(const Weight *w, const Rounded *from, int64_t batch, int64_t columns,
                        float *out, int64_t rows, int64_t first, int64_t last) {
    int64_t blocks = from->padded / (32 * PLANES(w->width)), pitch = columns * w->width / 8;
    for (int64_t row = first, many; row < last; row += many) {
        int64_t groups[2];
        int8_t tables[2][16];
        many = batch == 1 && row + 1 < last ? 2 : 1;
        for (int64_t r = 0; r < many; r++) {
            groups[r] = (row + r) * columns / w->run % w->groups;
            memcpy(tables[r], from->tables + 16 * groups[r], 16);
        }
        for (int64_t b = 0; b < batch;) {
            int some = power_of_two_below(batch - b, MOST_BYTE_INPUTS);
            int32_t sums[MOST_BYTE_INPUTS];
            dot_bytes(w->data + row * pitch, w->end, pitch, blocks, w->width, many, some,
                      tables[0], from->inputs + b * from->padded, from->padded, sums);
            for (int64_t r = 0; r < many; r++)
                for (int i = 0; i < some; i++)
                    out[(b + i) * rows + row + r] =
                        sums[r * some + i] * (from->factors[b + i] * from->steps[groups[r]]);
            b += some;
        }
    }
}

/* linear_int8(data, bytes, codebook, width, k, groups, run, input, batch, columns, out, rows,
 * first, last): as `linear`, with inputs and codebooks rounded to eight bits; rows begin with a
 * byte, indices have up to four bits. */
static PyObject *linear_int8(PyObject *self, PyObject *args) {
    unsigned long long data, codebook, input, out;
    Py_ssize_t bytes, batch, columns, rows, first, last;
    Weight w;
    Rounded to;
    if (!PyArg_ParseTuple(args, "KnKinnnKnnKnnn", &data, &bytes, &codebook, &w.width, &w.k,
                          &w.groups, &w.run, &input, &batch, &columns, &out, &rows, &first, &last))
        return NULL;
    w.data = (const uint8_t *)(uintptr_t)data;
    w.end = w.data + bytes;
    const float *x = (const float *)(uintptr_t)input, *books = (const float *)(uintptr_t)codebook;
    float *y = (float *)(uintptr_t)out;
    int64_t block = 32 * PLANES(w.width), some = batch < MOST_ROUNDED ? batch : MOST_ROUNDED;
    to.padded = (columns + block - 1) / block * block;
    float *scratch = malloc((some + w.groups) * sizeof(float) + (some + 1) * to.padded +
                            16 * w.groups);
    if (!scratch) return PyErr_NoMemory();
    to.factors = scratch;
    to.steps = to.factors + some;
    to.tables = (int8_t *)(to.steps + w.groups);
    to.row = to.tables + 16 * w.groups;
    to.inputs = to.row + to.padded;
    Py_BEGIN_ALLOW_THREADS
    memset(to.tables, 0, 16 * w.groups);
    for (int64_t g = 0; g < w.groups; g++)
        to.steps[g] = row_to_bytes(books + g * w.k, w.k, to.tables + 16 * g);
    for (int64_t b = 0; b < batch; b += some) {
        int64_t left = batch - b < some ? batch - b : some;
        round_inputs(&to, x + b * columns, left, columns, w.width);
        dot_rounded(&w, &to, left, columns, y + b * rows, rows, first, last);
    }
    Py_END_ALLOW_THREADS
    free(scratch);
    Py_RETURN_NONE;
}

#endif

/* Switch the variants for AVX2 on or off; returns whether they are now used. */
static PyObject *use_simd(PyObject *self, PyObject *args) {
    int wanted;
    if (!PyArg_ParseTuple(args, "p", &wanted)) return NULL;
    simd = wanted && processor_has_avx2();
    return PyBool_FromLong(simd);
}

static PyMethodDef methods[] = {
    {"decode", decode, METH_VARARGS, NULL},
#if HAS_AVX2
    {"arrange_floats", arrange_floats, METH_VARARGS, NULL},
    {"linear", linear, METH_VARARGS, NULL},
    {"products", products, METH_VARARGS, NULL},
    {"patches", patches, METH_VARARGS, NULL},
    {"linear_int8", linear_int8, METH_VARARGS, NULL},
#endif
    {"use_simd", use_simd, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "Compiled twin of _eager.py.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
