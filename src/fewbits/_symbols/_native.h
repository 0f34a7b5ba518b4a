/* What the two sources of the module share. */
#ifndef FEWBITS_NATIVE_H
#define FEWBITS_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline PyObject *refuse(const char *why) {
    PyErr_SetString(PyExc_ValueError, why);
    return NULL;
}

/* In _rans.c. */
PyObject *encode(PyObject *self, PyObject *args);
PyObject *decode(PyObject *self, PyObject *args);

#endif
