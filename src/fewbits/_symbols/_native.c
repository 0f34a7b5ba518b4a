/* Compiled twin of _numpy.py, which defines what each function does.
 *
 * Every function takes flat C-contiguous buffers and checks their lengths itself: whatever the
 * caller passes, nothing outside the buffers is read or written. The loops run without the GIL.
 */
#include "_native.h"

#define MOST_CLASSES 256
#define CHUNK 4096 /* indices unpacked at a time on the stack, so that they stay in L1 */

/* ---- distinct values ------------------------------------------------------------------- */

static inline uint64_t item(const unsigned char *data, Py_ssize_t i, int size) {
    switch (size) {
    case 1: return data[i];
    case 2: return ((const uint16_t *)data)[i];
    case 4: return ((const uint32_t *)data)[i];
    default: return ((const uint64_t *)data)[i];
    }
}

typedef struct {
    uint64_t *keys;
    uint32_t *ids; /* 0 is free, else the identity plus 1 */
    uint32_t mask, count, most;
} Table;

/* Return a value's identity, giving it the next one if it is new; `most` if there are too many. */
static inline uint32_t identity(Table *table, uint64_t value) {
    uint32_t at = (uint32_t)((value * 0x9E3779B97F4A7C15ull) >> 40) & table->mask;
    while (table->ids[at]) {
        if (table->keys[at] == value) return table->ids[at] - 1;
        at = (at + 1) & table->mask;
    }
    if (table->count == table->most) return table->most;
    table->keys[at] = value;
    table->ids[at] = ++table->count;
    return table->count - 1;
}

/* Fill `indices` and `values`; inlined once per item size, so that the loop has no switch. */
static inline int fill(Table *table, const unsigned char *data, Py_ssize_t n, int size,
                       uint16_t *indices, uint64_t *values) {
    for (Py_ssize_t i = 0; i < n; i++) {
        uint64_t value = item(data, i, size);
        uint32_t before = table->count, id = identity(table, value);
        if (id == table->most) return 0;
        if (table->count != before) values[id] = value;
        indices[i] = (uint16_t)id;
    }
    return 1;
}

static PyObject *distinct(PyObject *self, PyObject *args) {
    Py_buffer data, indices, values;
    int most, ok = 0;
    if (!PyArg_ParseTuple(args, "y*iw*w*", &data, &most, &indices, &values)) return NULL;
    Py_ssize_t n = indices.len / 2, size = n ? data.len / n : 1;
    PyObject *result = NULL;
    Table table = {0};
    uint32_t slots = 1024;
    if ((size != 1 && size != 2 && size != 4 && size != 8) || most < 1 || most > 65536
        || data.len != n * size || values.len < 8 * (Py_ssize_t)most) {
        refuse("distinct: wrong sizes");
        goto done;
    }
    while (slots < 4u * (uint32_t)most) slots *= 2;
    table.most = (uint32_t)most;
    table.mask = slots - 1;
    table.keys = malloc(slots * sizeof(uint64_t));
    table.ids = calloc(slots, sizeof(uint32_t));
    if (!table.keys || !table.ids) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    switch (size) {
    case 1: ok = fill(&table, data.buf, n, 1, indices.buf, values.buf); break;
    case 2: ok = fill(&table, data.buf, n, 2, indices.buf, values.buf); break;
    case 4: ok = fill(&table, data.buf, n, 4, indices.buf, values.buf); break;
    default: ok = fill(&table, data.buf, n, 8, indices.buf, values.buf);
    }
    Py_END_ALLOW_THREADS
    result = PyLong_FromLong(ok ? (long)table.count : -1);
done:
    free(table.keys);
    free(table.ids);
    PyBuffer_Release(&data);
    PyBuffer_Release(&indices);
    PyBuffer_Release(&values);
    return result;
}

static PyObject *remap(PyObject *self, PyObject *args) {
    Py_buffer indices, ranks;
    if (!PyArg_ParseTuple(args, "w*y*", &indices, &ranks)) return NULL;
    Py_ssize_t n = indices.len / 2, k = ranks.len / 2;
    uint16_t *index = indices.buf;
    const uint16_t *rank = ranks.buf;
    int ok = 1;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < n; i++) {
        if (index[i] >= k) {
            ok = 0;
            break;
        }
        index[i] = rank[index[i]];
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&indices);
    PyBuffer_Release(&ranks);
    if (!ok) return refuse("remap: index out of range");
    Py_RETURN_NONE;
}

/* ---- contexts -------------------------------------------------------------------------- */

typedef struct {
    Py_buffer maps[3]; /* int32, the class of each position on an axis */
    Py_ssize_t size[3];
    int count[3];
} Axes;

static int axes_fit(Axes *axes, Py_ssize_t n) {
    for (int a = 0; a < 3; a++) axes->size[a] = axes->maps[a].len / 4;
    if (n != axes->size[0] * axes->size[1] * axes->size[2]) return 0;
    for (int a = 0; a < 3; a++) {
        const int32_t *map = axes->maps[a].buf;
        for (Py_ssize_t i = 0; i < axes->size[a]; i++)
            if (map[i] < 0 || map[i] >= axes->count[a]) return 0;
    }
    return 1;
}

static void release_axes(Axes *axes) {
    for (int a = 0; a < 3; a++) PyBuffer_Release(&axes->maps[a]);
}

static PyObject *histogram(PyObject *self, PyObject *args) {
    Py_buffer indices, table;
    Axes axes;
    if (!PyArg_ParseTuple(args, "y*(y*y*y*)(iii)w*", &indices, &axes.maps[0], &axes.maps[1],
                          &axes.maps[2], &axes.count[0], &axes.count[1], &axes.count[2], &table))
        return NULL;
    int64_t contexts = (int64_t)axes.count[0] * axes.count[1] * axes.count[2];
    Py_ssize_t k = contexts > 0 ? table.len / 8 / contexts : 0;
    int ok = axes_fit(&axes, indices.len / 2) && k >= 1 && table.len == 8 * contexts * k;
    if (ok) {
        const uint16_t *index = indices.buf;
        const int32_t *first = axes.maps[0].buf, *second = axes.maps[1].buf,
                      *rest = axes.maps[2].buf;
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; ok && i < axes.size[0]; i++)
            for (Py_ssize_t j = 0; ok && j < axes.size[1]; j++) {
                int64_t context = ((int64_t)first[i] * axes.count[1] + second[j]) * axes.count[2];
                int64_t *rows = (int64_t *)table.buf + context * k;
                for (Py_ssize_t t = 0; t < axes.size[2]; t++, index++) {
                    if (*index >= k) {
                        ok = 0;
                        break;
                    }
                    rows[rest[t] * k + *index]++;
                }
            }
        Py_END_ALLOW_THREADS
    }
    release_axes(&axes);
    PyBuffer_Release(&indices);
    PyBuffer_Release(&table);
    if (!ok) return refuse("histogram: wrong sizes, or class or index out of range");
    Py_RETURN_NONE;
}

/* Positions of one axis, those of class 0 first; `starts` has where each class begins. */
static Py_ssize_t *by_class(const int32_t *map, Py_ssize_t size, int count, Py_ssize_t *starts) {
    Py_ssize_t *order = malloc((size ? size : 1) * sizeof(Py_ssize_t)), filled = 0;
    for (int c = 0; order && c < count; c++) {
        starts[c] = filled;
        for (Py_ssize_t i = 0; i < size; i++)
            if (map[i] == c) order[filled++] = i;
    }
    starts[count] = filled;
    return order;
}

static PyObject *reorder(PyObject *self, PyObject *args) {
    Py_buffer source, target;
    Axes axes;
    int back;
    if (!PyArg_ParseTuple(args, "y*(y*y*y*)(iii)w*p", &source, &axes.maps[0], &axes.maps[1],
                          &axes.maps[2], &axes.count[0], &axes.count[1], &axes.count[2], &target,
                          &back))
        return NULL;
    Py_ssize_t starts[3][MOST_CLASSES + 1], *order[3] = {NULL, NULL, NULL};
    const int *count = axes.count;
    int ok = source.len == target.len && axes_fit(&axes, source.len / 2);
    for (int a = 0; ok && a < 3; a++) {
        ok = count[a] >= 1 && count[a] <= MOST_CLASSES;
        if (ok) order[a] = by_class(axes.maps[a].buf, axes.size[a], count[a], starts[a]);
        ok = ok && order[a];
    }
    if (ok) {
        const uint16_t *from = source.buf;
        uint16_t *to = target.buf;
        Py_BEGIN_ALLOW_THREADS
        for (int c = 0; c < count[0] * count[1] * count[2]; c++) {
            int a = c / count[2] / count[1], b = c / count[2] % count[1], t = c % count[2];
            const Py_ssize_t *last = order[2] + starts[2][t + 1];
            if (starts[2][t] == starts[2][t + 1]) continue; /* no position is of this class */
            if (axes.size[2] == 1) { /* a matrix: no loop of one turn inside */
                const Py_ssize_t *columns = order[1] + starts[1][b];
                Py_ssize_t many = starts[1][b + 1] - starts[1][b];
                for (Py_ssize_t i = starts[0][a]; i < starts[0][a + 1]; i++) {
                    Py_ssize_t base = order[0][i] * axes.size[1];
                    if (back)
                        for (Py_ssize_t j = 0; j < many; j++) to[base + columns[j]] = from[j];
                    else
                        for (Py_ssize_t j = 0; j < many; j++) to[j] = from[base + columns[j]];
                    if (back)
                        from += many;
                    else
                        to += many;
                }
                continue;
            }
            for (Py_ssize_t i = starts[0][a]; i < starts[0][a + 1]; i++)
                for (Py_ssize_t j = starts[1][b]; j < starts[1][b + 1]; j++) {
                    Py_ssize_t base = (order[0][i] * axes.size[1] + order[1][j]) * axes.size[2];
                    const Py_ssize_t *at = order[2] + starts[2][t];
                    if (back)
                        for (; at < last; at++) to[base + *at] = *from++;
                    else
                        for (; at < last; at++) *to++ = from[base + *at];
                }
        }
        Py_END_ALLOW_THREADS
    }
    for (int a = 0; a < 3; a++) free(order[a]);
    release_axes(&axes);
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    if (!ok) return refuse("reorder: wrong sizes or class out of range");
    Py_RETURN_NONE;
}

/* ---- fixed width ----------------------------------------------------------------------- */

static PyObject *pack(PyObject *self, PyObject *args) {
    Py_buffer indices, packed;
    int width;
    if (!PyArg_ParseTuple(args, "y*iw*", &indices, &width, &packed)) return NULL;
    Py_ssize_t n = indices.len / 2;
    int ok = width >= 0 && width <= 16 && packed.len == (n * width + 7) / 8;
    if (ok) {
        const uint16_t *index = indices.buf;
        unsigned char *to = packed.buf;
        uint64_t held = 0, wide = 0;
        int bits = 0;
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < n; i++) {
            wide |= index[i];
            held |= (uint64_t)index[i] << bits;
            for (bits += width; bits >= 8; bits -= 8, held >>= 8) *to++ = (unsigned char)held;
        }
        if (bits) *to = (unsigned char)held;
        Py_END_ALLOW_THREADS
        ok = wide >> width == 0;
    }
    PyBuffer_Release(&indices);
    PyBuffer_Release(&packed);
    if (!ok) return refuse("pack: wrong sizes or index too wide");
    Py_RETURN_NONE;
}

/* Unpack `count` indices from a multiple of 8 indices on; `data` may be read up to `end` only. */
static void unpack_some(const unsigned char *data, const unsigned char *end, int width,
                        Py_ssize_t count, uint16_t *index) {
    uint32_t mask = (1u << width) - 1;
    if (width == 4) {
        for (; count >= 2; count -= 2, data++) {
            *index++ = *data & 15;
            *index++ = *data >> 4;
        }
    } else if (width == 8) {
        for (; count; count--) *index++ = *data++;
    } else if (width) {
        /* Groups of eight indices are `width` bytes; two loads of 8 bytes cover them. */
        for (; count >= 8 && end - data >= 16; count -= 8, data += width) {
            uint64_t low, high;
            memcpy(&low, data, 8);
            memcpy(&high, data + width / 2, 8);
            int skip = 4 * width - 8 * (width / 2);
            for (int i = 0; i < 4; i++) *index++ = (low >> (i * width)) & mask;
            for (int i = 0; i < 4; i++) *index++ = (high >> (skip + i * width)) & mask;
        }
    }
    uint32_t held = 0;
    int bits = 0;
    for (; count; count--) {
        for (; bits < width; bits += 8) held |= (uint32_t)(data < end ? *data++ : 0) << bits;
        *index++ = held & mask;
        held >>= width;
        bits -= width;
    }
}

typedef struct {
    Py_ssize_t outer, groups, run, k; /* elements lie as (outer, groups, run) */
    int size;                         /* bytes of a value */
} Layout;

static int layout_fits(Layout *of, Py_ssize_t n, const Py_buffer *codebook, const Py_buffer *out) {
    if (of->outer < 1 || of->groups < 1 || of->run < 1 || of->k < 1
        || n != of->outer * of->groups * of->run)
        return 0;
    of->size = (int)(out->len / n);
    return (of->size == 1 || of->size == 2 || of->size == 4 || of->size == 8)
           && codebook->len == of->groups * of->k * of->size && out->len == n * of->size;
}

/* Write the values of indices from position `at` on; 0 if an index is not below k. */
static int write_values(const uint16_t *index, Py_ssize_t count, Py_ssize_t at, const Layout *of,
                        const unsigned char *codebook, unsigned char *out) {
    uint32_t widest = 0;
    for (Py_ssize_t i = 0; i < count; i++) widest = index[i] > widest ? index[i] : widest;
    if (count && widest >= (size_t)of->k) return 0;
    while (count) {
        Py_ssize_t left = of->run - at % of->run, part = left < count ? left : count;
        const unsigned char *book = codebook + (at / of->run % of->groups) * of->k * of->size;
        switch (of->size) {
        case 1:
            for (Py_ssize_t i = 0; i < part; i++) out[at + i] = book[index[i]];
            break;
        case 2:
            for (Py_ssize_t i = 0; i < part; i++)
                ((uint16_t *)out)[at + i] = ((const uint16_t *)book)[index[i]];
            break;
        case 4:
            for (Py_ssize_t i = 0; i < part; i++)
                ((uint32_t *)out)[at + i] = ((const uint32_t *)book)[index[i]];
            break;
        default:
            for (Py_ssize_t i = 0; i < part; i++)
                ((uint64_t *)out)[at + i] = ((const uint64_t *)book)[index[i]];
        }
        index += part;
        count -= part;
        at += part;
    }
    return 1;
}

static PyObject *unpack(PyObject *self, PyObject *args) {
    Py_buffer packed, indices;
    int width;
    if (!PyArg_ParseTuple(args, "y*iw*", &packed, &width, &indices)) return NULL;
    Py_ssize_t n = indices.len / 2;
    int ok = width >= 0 && width <= 16 && packed.len == (n * width + 7) / 8;
    if (ok) {
        const unsigned char *data = packed.buf;
        Py_BEGIN_ALLOW_THREADS
        unpack_some(data, data + packed.len, width, n, indices.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&packed);
    PyBuffer_Release(&indices);
    if (!ok) return refuse("unpack: wrong sizes");
    Py_RETURN_NONE;
}

static PyObject *expand(PyObject *self, PyObject *args) {
    Py_buffer indices, codebook, out;
    Layout of;
    int ok;
    if (!PyArg_ParseTuple(args, "y*(nnn)ny*w*", &indices, &of.outer, &of.groups, &of.run, &of.k,
                          &codebook, &out))
        return NULL;
    Py_ssize_t n = indices.len / 2;
    ok = layout_fits(&of, n, &codebook, &out);
    if (ok) {
        const uint16_t *index = indices.buf;
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t at = 0; ok && at < n; at += CHUNK)
            ok = write_values(index + at, n - at < CHUNK ? n - at : CHUNK, at, &of, codebook.buf,
                              out.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&indices);
    PyBuffer_Release(&codebook);
    PyBuffer_Release(&out);
    if (!ok) return refuse("expand: wrong sizes or index out of range");
    Py_RETURN_NONE;
}

/* `unpack` and `expand` in one pass. */
static PyObject *unpack_expand(PyObject *self, PyObject *args) {
    Py_buffer packed, codebook, out;
    Layout of;
    int width, ok;
    if (!PyArg_ParseTuple(args, "y*i(nnn)ny*w*", &packed, &width, &of.outer, &of.groups, &of.run,
                          &of.k, &codebook, &out))
        return NULL;
    Py_ssize_t n = of.outer * of.groups * of.run;
    ok = layout_fits(&of, n, &codebook, &out) && width >= 0 && width <= 16
         && packed.len == (n * width + 7) / 8;
    if (ok) {
        const unsigned char *data = packed.buf, *end = data + packed.len;
        uint16_t index[CHUNK];
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t at = 0; ok && at < n; at += CHUNK) {
            Py_ssize_t count = n - at < CHUNK ? n - at : CHUNK;
            unpack_some(data + at / 8 * width, end, width, count, index);
            ok = write_values(index, count, at, &of, codebook.buf, out.buf);
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&packed);
    PyBuffer_Release(&codebook);
    PyBuffer_Release(&out);
    if (!ok) return refuse("unpack: wrong sizes or index out of range");
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"distinct", distinct, METH_VARARGS, NULL},
    {"remap", remap, METH_VARARGS, NULL},
    {"histogram", histogram, METH_VARARGS, NULL},
    {"reorder", reorder, METH_VARARGS, NULL},
    {"pack", pack, METH_VARARGS, NULL},
    {"unpack", unpack, METH_VARARGS, NULL},
    {"expand", expand, METH_VARARGS, NULL},
    {"unpack_expand", unpack_expand, METH_VARARGS, NULL},
    {"encode", encode, METH_VARARGS, NULL},
    {"decode", decode, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "Compiled twin of _numpy.py.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
