/* Compiled twin of _runs.py: runs of points of least squared error; included by _native.c. */

/* Sums of all points before each, for one group. */
typedef struct {
    const double *counts, *sums, *squares;
    int64_t width; /* points + 1 */
} Points;

/* Return the first of the starts `low` … `high` that makes best[start] plus the squared error of the
 * points from there up to `stop` least, and that minimum. */
static int64_t best_start(const Points *p, const double *best, int64_t low, int64_t high,
                          int64_t stop, double *values, double *least) {
    const double count = p->counts[stop], sum = p->sums[stop], square = p->squares[stop];
    for (int64_t i = low; i <= high; i++) {
        double n = count - p->counts[i], s = sum - p->sums[i];
        double cost = square - p->squares[i] - s * s / (n > 1 ? n : 1);
        values[i] = best[i] + (cost > 0 ? cost : 0);
    }
    int64_t start = low;
    for (int64_t i = low + 1; i <= high; i++) start = values[i] < values[start] ? i : start;
    *least = values[start];
    return start;
}

/* From the least errors of some number of runs up to each stop make those of one run more, and note
 * where that run begins: no earlier than the last of the runs before (`before`), nor than up to an
 * earlier stop. So stops half-way between known ones come next. */
static void one_more(const Points *p, const double *best, double *more, const int32_t *before,
                     int32_t *choice, double *values) {
    int64_t step = 1;
    while (step < p->width) step *= 2;
    choice[0] = 0;
    more[0] = best[0];
    for (; step > 0; step /= 2)
        for (int64_t stop = step; stop < p->width; stop += 2 * step) {
            int64_t low = choice[stop - step], high = stop;
            if (stop + step < p->width && choice[stop + step] < stop) high = choice[stop + step];
            if (low < before[stop]) low = before[stop] < high ? before[stop] : high;
            choice[stop] = (int32_t)best_start(p, best, low, high, stop, values, more + stop);
        }
}

/* Write where each of one group's k runs begins; `choices` has (k, width) places, `errors` 3 width. */
static void cut_group(const Points *p, int64_t k, int32_t *choices, double *errors,
                      int64_t *starts) {
    double *best = errors, *more = errors + p->width, *values = errors + 2 * p->width;
    for (int64_t stop = 0; stop < p->width; stop++) {
        values[0] = 0;
        best_start(p, values, 0, 0, stop, values, best + stop);
    }
    memset(choices, 0, p->width * sizeof(int32_t)); /* one run begins at the first point */
    for (int64_t run = 1; run < k; run++) {
        int32_t *before = choices + (run - 1) * p->width;
        one_more(p, best, more, before, before + p->width, values);
        double *last = best;
        best = more;
        more = last;
    }
    int64_t stop = p->width - 1;
    for (int64_t run = k - 1; run > 0; run--) starts[run] = stop = choices[run * p->width + stop];
    starts[0] = 0;
}

/* See _runs.best_runs; the arrays are contiguous, and `starts` is what is written. */
static PyObject *best_runs(PyObject *self, PyObject *args) {
    Py_buffer counts, sums, squares, starts;
    long long groups, k;
    if (!PyArg_ParseTuple(args, "y*y*y*w*LL", &counts, &sums, &squares, &starts, &groups, &k))
        return NULL;
    int64_t width = counts.len / (int64_t)sizeof(double) / (groups > 0 ? groups : 1);
    int32_t *choices = malloc(k * width * sizeof(int32_t));
    double *errors = malloc(3 * width * sizeof(double));
    int ok = choices && errors;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t group = 0; ok && group < groups; group++) {
        int64_t at = group * width;
        Points p = {(double *)counts.buf + at, (double *)sums.buf + at, (double *)squares.buf + at,
                    width};
        cut_group(&p, k, choices, errors, (int64_t *)starts.buf + group * k);
    }
    Py_END_ALLOW_THREADS
    free(choices);
    free(errors);
    PyBuffer_Release(&counts);
    PyBuffer_Release(&sums);
    PyBuffer_Release(&squares);
    PyBuffer_Release(&starts);
    if (!ok) return PyErr_NoMemory();
    Py_RETURN_NONE;
}
