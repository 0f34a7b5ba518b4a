/* Compiled twin of _eager.py, which defines what each operation does; called by _cpu.py.
 *
 * A call runs one operation over a table of weights. Each is cut into parts by its shape alone, so
 * that sums are formed in the same order on any number of threads. Addresses come from the caller,
 * who answers for their sizes; the loops run without the GIL.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if (defined(__GNUC__) && defined(__x86_64__)) || (defined(_MSC_VER) && defined(__AVX2__))
#define HAS_AVX2 1
#include <immintrin.h>
#else
#define HAS_AVX2 0
#endif

#define BLOCK 1024 /* weights at a time: their temporaries stay in L1 */
#define TREE 16    /* most values that are found by comparisons alone */
#define MOST_CELLS (1 << 20)
#define CROWDED ((int32_t)-2147483647 - 1) /* the sign bit of a cell with several boundaries */
#define GROUPED 8192 /* least weights in a row for sums by pairs of indices, 256 of them */
#define NARROW 1024  /* most sums that are formed in float32 first */
#define STRETCH 16   /* blocks after which those are added up in float64 */

enum { MEASURE, SUMS, ADD, PULL, MOVE, SNAP, ASSIGN, MOMENTS };
enum { FLOAT32, BFLOAT16, FLOAT16, UINT8, INT32 };

/* One weight's row of the table that `_cpu._Table` fills. */
typedef struct {
    const void *weight; /* (groups, members) contiguous, of the call's `type` */
    int64_t groups, members, parts;
    int64_t row;    /* its first row of the codebook: the groups of the weights before it */
    int64_t slot;   /* its first row of the work space */
    int64_t before; /* parts of the weights before it */
} Entry;

/* Field by field what `_cpu._CALL` packs. */
typedef struct {
    const Entry *entries;
    void *const *outs;       /* one a weight, of `out_type`, contiguous; NULL for none */
    const float *codebook;   /* (rows, k) ascending */
    const float *boundaries; /* (rows, k - 1) ascending; NULL for midpoints */
    const double *amounts;   /* one a weight; NULL where none is needed */
    double *work;            /* (parts, 2) totals, (slots, k) counts and (slots, k) sums */
    double *results;         /* (2, count) totals, (rows, k) counts and (rows, k) sums */
    int64_t count, type, out_type, k, power, parts, slots, rows;
} Call;

/* One weight with all that the passes need. */
typedef struct {
    const void *weight;
    void *out;
    const float *codebook, *boundaries;
    double *counts, *sums; /* (parts, k) where there is one group, else (groups, k) */
    double *totals;        /* (parts, 2): the penalty and, once combined, squared deviations */
    int64_t type, out_type, groups, members, k, power, parts;
    double amount;
} Job;

typedef struct {
    double sum, count;
} Pair;

/* Where one row's sums by cluster are formed, and how those of ADD and of MEASURE for nearest-2 are:
 * by comparisons, of up to 4 values; by the indices of two neighbouring weights, of up to 16; by
 * cluster; or at once in float64. The others take float32 for up to STRETCH blocks: where all
 * numbers are alike, that may be off by 10^-4; else by 10^-7.
 */
typedef struct {
    Pair *single; /* (k, lanes) */
    int lanes;
    enum { FEW, PAIRS, ONES, EXACT } kind;
    float *narrow; /* PAIRS: (256, 2) of two sums, a count, 0; ONES: (k, lanes) of sum, count */
} Sums;

/* A cell of an even grid: which numbers the weights in it may be nearest to. */
typedef struct {
    float bound, lower, upper; /* the first boundary in or above it, and its neighbours */
    int32_t below;             /* boundaries in lower cells; and whether it is CROWDED */
} Cell;

/* How one row's representatives are found. */
typedef struct {
    int64_t k;
    const float *codebook;
    float *boundaries; /* with an infinity after the last */
    Cell *grid;        /* used where `cells` > 0 */
    int cells, crowded; /* whether any cell is */
    int levels;         /* of the tree; 0 for more values than TREE */
    float low, per_unit;
    float tree[40]; /* see `plant` */
} Search;

#include "_processor.h"

#include "_halves.h"

#include "_sums.h"

#ifdef __GNUC__
#define AVX2 __attribute__((target("avx2,f16c")))
#define ALIGNED __attribute__((aligned(64)))
#elif defined(_MSC_VER)
#define AVX2
#define ALIGNED __declspec(align(64))
#else
#define AVX2
#define ALIGNED
#endif

#define NAME(x) x##_portable
#define TARGET
#define SIMD 0
#include "_passes.h"
#undef NAME
#undef TARGET
#undef SIMD

#if HAS_AVX2
#define NAME(x) x##_avx2
#define TARGET AVX2
#ifdef __GNUC__
#define INLINE AVX2 static inline __attribute__((always_inline))
#else
#define INLINE static __forceinline
#endif
#define SIMD 1
#include "_simd.h"
#include "_passes.h"
#endif

static int simd = 0; /* whether the second variant is used */

static void run(int operation, const Job *job, const Search *s, int64_t at, int64_t end,
                Sums *sums, double total[8]) {
#if HAS_AVX2
    if (simd) {
        run_avx2(operation, job, s, at, end, sums, total);
        return;
    }
#endif
    run_portable(operation, job, s, at, end, sums, total);
}

static void moments(const Job *job, int64_t at, int64_t end, double sum[8], double squares[8]) {
#if HAS_AVX2
    if (simd) {
        moments_avx2(job, at, end, sum, squares);
        return;
    }
#endif
    moments_portable(job, at, end, sum, squares);
}

#include "_search.h"

#include "_runs.h"

/* ---- running jobs ----------------------------------------------------------------------- */

/* Copies of each cluster's sum: many where few clusters would make neighbours wait for each
 * other, fewer where adding them up would cost as much as the row itself. */
static int lanes_for(const Job *job) {
    int lanes = 8;
    while (lanes > 1 && (lanes * job->k > 1024 || 4 * lanes * job->k > job->members)) lanes /= 2;
    return lanes;
}

static void clear(Sums *sums, int64_t k) {
    memset(sums->single, 0, sums->lanes * k * sizeof(Pair));
    if (sums->kind == PAIRS) memset(sums->narrow, 0, 2 * NARROW * sizeof(float));
    if (sums->kind == ONES) memset(sums->narrow, 0, 2 * sums->lanes * k * sizeof(float));
}

static void write_sums(const Sums *sums, int64_t k, double *counts, double *totals) {
    for (int64_t j = 0; j < k; j++) {
        totals[j] = counts[j] = 0;
        for (int l = 0; l < sums->lanes; l++) {
            totals[j] += sums->single[j * sums->lanes + l].sum;
            counts[j] += sums->single[j * sums->lanes + l].count;
        }
    }
}

static void run_part(int operation, const Job *job, int64_t part, Search *s, Sums sums) {
    int64_t rows = (job->groups + job->parts - 1) / job->parts, columns = job->members;
    int64_t row = part * rows, from = 0;
    sums.lanes = lanes_for(job);
    int quick = operation == ADD || (operation == MEASURE && job->power == 2);
    if (!quick || sums.lanes * job->k > NARROW) sums.kind = EXACT;
    else if (job->k <= 4) sums.kind = FEW;
    else sums.kind = job->k <= TREE && job->members >= GROUPED ? PAIRS : ONES;
    if (job->groups == 1) {
        columns = ((job->members + job->parts - 1) / job->parts + BLOCK - 1) / BLOCK * BLOCK;
        from = part * columns;
        row = 0;
    }
    double total[8] = {0}, squares[8] = {0};
    int summed = operation == MEASURE || operation == SUMS || operation == ADD || operation == MOVE;
    for (int64_t stop = row + rows < job->groups ? row + rows : job->groups; row < stop; row++) {
        int64_t left = job->members - from, n = left < columns ? left : columns;
        int64_t at = row * job->members + from;
        if (operation == MOMENTS) {
            moments(job, at, at + n, total, squares);
            continue;
        }
        search_row(s, job, row);
        if (summed) clear(&sums, job->k);
        run(operation, job, s, at, at + n, &sums, total);
        int64_t to = (job->groups == 1 ? part : row) * job->k;
        if (summed) write_sums(&sums, job->k, job->counts + to, job->sums + to);
    }
    if (operation == MEASURE || operation == MOMENTS) {
        double *to = job->totals + 2 * part;
        to[0] = to[1] = 0;
        for (int l = 0; l < 8; l++) {
            to[0] += total[l];
            to[1] += squares[l];
        }
    }
}

static Job job_of(const Call *call, int64_t i) {
    const Entry *e = call->entries + i;
    Job job = {
        .weight = e->weight,
        .out = call->outs ? call->outs[i] : NULL,
        .codebook = call->codebook ? call->codebook + e->row * call->k : NULL,
        .boundaries = call->boundaries ? call->boundaries + e->row * (call->k - 1) : NULL,
        .type = call->type,
        .out_type = call->out_type,
        .groups = e->groups,
        .members = e->members,
        .k = call->k,
        .power = call->power,
        .parts = e->parts,
        .amount = call->amounts ? call->amounts[i] : 0,
    };
    if (call->work) {
        job.totals = call->work + 2 * e->before;
        job.counts = call->work + 2 * call->parts + e->slot * call->k;
        job.sums = job.counts + call->slots * call->k;
    }
    return job;
}

/* Run the parts `first` … `last` - 1 of all weights together; 0 where memory is short. */
static int run_parts(int operation, const Call *call, int64_t first, int64_t last) {
    Search s = {.k = call->k};
    ALIGNED float narrow[2 * NARROW];
    Sums sums = {.single = malloc(8 * call->k * sizeof(Pair)), .narrow = narrow};
    s.boundaries = malloc(call->k * sizeof(float));
    s.grid = malloc(most_cells(call->k) * sizeof(Cell));
    int ok = s.boundaries && s.grid && sums.single;
    int64_t low = 0, high = call->count; /* the weight that has part `first`: the last to begin */
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (call->entries[middle].before <= first) low = middle;
        else high = middle;
    }
    for (int64_t i = low; ok && i < call->count && first < last; i++) {
        Job job = job_of(call, i);
        for (; first < last && first < call->entries[i].before + job.parts; first++)
            run_part(operation, &job, first - call->entries[i].before, &s, sums);
    }
    free(s.boundaries);
    free(s.grid);
    free(sums.single);
    return ok;
}

static PyObject *run_call(PyObject *self, PyObject *args) {
    Py_buffer call;
    int operation, ok;
    long long first, last;
    if (!PyArg_ParseTuple(args, "iy*LL", &operation, &call, &first, &last)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    ok = run_parts(operation, call.buf, first, last);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&call);
    if (!ok) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* Add the later parts' sums and totals to the first, in order. */
static void add_parts(int operation, const Job *job) {
    for (int64_t part = 1; part < job->parts; part++) {
        for (int64_t j = 0; operation != MOMENTS && job->groups == 1 && j < job->k; j++) {
            job->counts[j] += job->counts[part * job->k + j];
            job->sums[j] += job->sums[part * job->k + j];
        }
        for (int t = 0; (operation == MEASURE || operation == MOMENTS) && t < 2; t++)
            job->totals[t] += job->totals[2 * part + t];
    }
}

/* Sum of squared deviations of all weights from their mean.
 *
 * For nearest-2 it follows from the sums by cluster. Where a codebook lies so far off that this
 * would be off, and for nearest-1, it takes a pass of its own.
 */
static double deviations(const Job *job) {
    double size = (double)job->groups * (double)job->members, mean = 0, spread = job->totals[0];
    int64_t count = job->groups * job->k;
    if (size == 0) return 0;
    if (job->power == 2) {
        for (int64_t j = 0; j < count; j++)
            mean += job->codebook[j] * job->counts[j] + job->sums[j];
        mean /= size;
        for (int64_t j = 0; j < count; j++) {
            double away = job->codebook[j] - mean;
            spread += away * (away * job->counts[j] + 2 * job->sums[j]);
        }
        if (!(spread < 0.1 * job->totals[0])) return spread;
    }
    double sum[8] = {0}, squares[8] = {0}, total = 0;
    moments(job, 0, job->groups * job->members, sum, squares);
    for (int l = 0; l < 8; l++) total += sum[l];
    spread = -total * total / size;
    for (int l = 0; l < 8; l++) spread += squares[l];
    return spread < 0 ? 0 : spread;
}

/* Write the results of a call of which all parts have run. */
static PyObject *combine(PyObject *self, PyObject *args) {
    Py_buffer buffer;
    int operation;
    if (!PyArg_ParseTuple(args, "iy*", &operation, &buffer)) return NULL;
    const Call *call = buffer.buf;
    Py_BEGIN_ALLOW_THREADS
    double *counts = call->results + 2 * call->count, *sums = counts + call->rows * call->k;
    for (int64_t i = 0; i < call->count; i++) {
        Job job = job_of(call, i);
        int64_t at = call->entries[i].row * call->k, size = job.groups * job.k * sizeof(double);
        add_parts(operation, &job);
        if (operation == MEASURE) job.totals[1] = deviations(&job);
        if (operation == MEASURE || operation == MOMENTS) {
            call->results[i] = job.totals[0];
            call->results[call->count + i] = job.totals[1];
        }
        if (operation != MOMENTS) {
            memcpy(counts + at, job.counts, size);
            memcpy(sums + at, job.sums, size);
        }
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&buffer);
    Py_RETURN_NONE;
}

/* Write the midpoints of (groups, k) codebooks, at the second address. */
static PyObject *midpoints(PyObject *self, PyObject *args) {
    unsigned long long from, to;
    long long groups, k;
    if (!PyArg_ParseTuple(args, "KKLL", &from, &to, &groups, &k)) return NULL;
    const float *codebook = (const float *)(uintptr_t)from;
    for (float *middle = (float *)(uintptr_t)to; groups-- > 0; codebook += k)
        for (int64_t j = 0; j < k - 1; j++) *middle++ = midpoint(codebook[j], codebook[j + 1]);
    Py_RETURN_NONE;
}

/* Switch the variant for AVX2 on or off; returns whether it is now used. */
static PyObject *use_simd(PyObject *self, PyObject *args) {
    int wanted;
    if (!PyArg_ParseTuple(args, "p", &wanted)) return NULL;
    simd = wanted && processor_has_avx2();
    return PyBool_FromLong(simd);
}

static PyMethodDef methods[] = {
    {"run", run_call, METH_VARARGS, NULL},
    {"combine", combine, METH_VARARGS, NULL},
    {"midpoints", midpoints, METH_VARARGS, NULL},
    {"best_runs", best_runs, METH_VARARGS, NULL},
    {"use_simd", use_simd, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "Compiled twin of _eager.py.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) {
    simd = processor_has_avx2();
    return PyModule_Create(&module);
}
