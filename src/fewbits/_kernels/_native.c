/* Compiled twin of _eager.py, which defines what each operation does; called by _cpu.py.
 *
 * A call runs one operation over a table of jobs, one a weight. Jobs are cut into parts by their
 * shape alone, so that sums are formed in the same order on any number of threads. Addresses come
 * from the caller, who answers for their sizes; the loops run without the GIL.
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
#define PAIRED 8192 /* least weights in a row for sums by pairs of indices, 1,024 of them */

enum { MEASURE, SUMS, PULL, MOVE, SNAP, ASSIGN, MOMENTS };
enum { FLOAT32, BFLOAT16, FLOAT16, UINT8, INT32 };

/* Field by field what `_cpu._JOB` packs. */
typedef struct {
    const void *weight;      /* (groups, members) contiguous, of `type` */
    void *out;               /* the same shape, of `out_type` */
    const float *codebook;   /* (groups, k) ascending */
    const float *boundaries; /* (groups, k - 1) ascending; NULL for midpoints */
    double *counts, *sums;   /* (parts, k) where there is one group, else (groups, k) */
    double *totals;          /* (parts, 2): the penalty and, once combined, squared deviations */
    int64_t type, out_type, groups, members, k, power, parts;
    double amount;
} Job;

typedef struct {
    double sum, count;
} Pair;

/* Sums and counts by the indices of two neighbouring weights: 4 lanes. */
typedef struct {
    double sums[4][256][2];
    uint32_t counts[4][256];
    uint32_t single; /* whether the last weight had no neighbour: counted as one of index 0 */
} Pairs;

/* Where one row's sums by cluster are formed. */
typedef struct {
    Pair *single; /* (k, lanes) */
    int lanes;
    Pairs *pairs; /* used instead where it is not NULL */
} Sums;

/* How one row's representatives are found. */
typedef struct {
    int64_t k;
    const float *codebook;
    float *boundaries; /* with an infinity after the last */
    uint16_t *below;   /* boundaries in lower cells than each; used where `cells` > 0 */
    int cells, most;   /* of the even grid; boundaries in its fullest cell */
    float low, per_unit;
    float tree[40]; /* see locate_tree */
} Search;

static inline float from_half(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13, scale = 0x77800000u; /* 2^112 */
    float value, factor;
    memcpy(&value, &bits, 4);
    memcpy(&factor, &scale, 4);
    value *= factor; /* exact for subnormal numbers too */
    memcpy(&bits, &value, 4);
    if (value >= 65536.0f) bits |= 0x7f800000u; /* infinity and NaN */
    bits |= (uint32_t)(half & 0x8000) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x47800000u) return (uint16_t)(sign | 0x7c00); /* from 65,536 on */
    if (bits < 0x38800000u) { /* subnormal: the addition rounds at the right bit */
        float small = fabsf(value) + 0.5f;
        memcpy(&bits, &small, 4);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    return (uint16_t)(sign | ((bits - 0x38000000u + 0xfff + (bits >> 13 & 1)) >> 13));
}

#define NAME(x) x##_portable
#define TARGET
#define SIMD 0
#include "_passes.h"
#undef NAME
#undef TARGET
#undef SIMD

#if HAS_AVX2
#define NAME(x) x##_avx2
#ifdef __GNUC__
#define TARGET __attribute__((target("avx2,f16c")))
#else
#define TARGET
#endif
#define SIMD 1
#include "_passes.h"
#endif

static int simd = 0; /* whether the second variant is used */

static int processor_has_avx2(void) {
#if HAS_AVX2 && defined(__GNUC__)
    return __builtin_cpu_supports("avx2") != 0; /* all of these have F16C as well */
#else
    return HAS_AVX2;
#endif
}

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

/* ---- running jobs ----------------------------------------------------------------------- */

/* Copies of each cluster's sum: many where few clusters would make neighbours wait for each
 * other, fewer where adding them up would cost as much as the row itself. */
static int lanes_for(const Job *job) {
    int lanes = 8;
    while (lanes > 1 && (lanes * job->k > 1024 || 4 * lanes * job->k > job->members)) lanes /= 2;
    return lanes;
}

static void clear(Sums *sums, int64_t k) {
    if (sums->pairs) memset(sums->pairs, 0, sizeof(Pairs));
    else memset(sums->single, 0, sums->lanes * k * sizeof(Pair));
}

static void write_sums(const Sums *sums, int64_t k, double *counts, double *totals) {
    for (int64_t j = 0; j < k; j++) {
        Pair all = {0, 0};
        if (sums->pairs) {
            for (int l = 0; l < 4; l++)
                for (int other = 0; other < 16; other++) {
                    int low = (int)j | other << 4, high = other | (int)j << 4;
                    all.sum += sums->pairs->sums[l][low][0] + sums->pairs->sums[l][high][1];
                    all.count += (double)sums->pairs->counts[l][low];
                    all.count += (double)sums->pairs->counts[l][high];
                }
            if (j == 0) all.count -= sums->pairs->single;
        } else {
            for (int l = 0; l < sums->lanes; l++) {
                all.sum += sums->single[j * sums->lanes + l].sum;
                all.count += sums->single[j * sums->lanes + l].count;
            }
        }
        totals[j] = all.sum;
        counts[j] = all.count;
    }
}

static void run_part(int operation, const Job *job, int64_t part, Search *s, Sums sums,
                     Pairs *pairs) {
    int64_t rows = (job->groups + job->parts - 1) / job->parts, columns = job->members;
    int64_t row = part * rows, from = 0;
    sums.lanes = lanes_for(job);
    sums.pairs = operation == MEASURE && job->power == 2 && job->k <= TREE
                         && job->members >= PAIRED
                     ? pairs
                     : NULL;
    if (job->groups == 1) {
        columns = ((job->members + job->parts - 1) / job->parts + BLOCK - 1) / BLOCK * BLOCK;
        from = part * columns;
        row = 0;
    }
    double total[8] = {0}, squares[8] = {0};
    int summed = operation == MEASURE || operation == SUMS;
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
    if (operation == MEASURE || operation == MOMENTS)
        for (int l = 0; l < 8; l++) {
            job->totals[2 * part] += total[l];
            job->totals[2 * part + 1] += squares[l];
        }
}

/* Run the parts `first` … `last` - 1 of all jobs together; 0 where memory is short. */
static int run_parts(int operation, const Job *jobs, Py_ssize_t count, int64_t first,
                     int64_t last) {
    Search s = {0};
    Sums sums = {0};
    Pairs pairs;
    int ok = 1;
    for (Py_ssize_t j = 0; j < count && first < last; j++) {
        const Job *job = jobs + j;
        if (first >= job->parts) {
            first -= job->parts;
            last -= job->parts;
            continue;
        }
        if (job->k > s.k) {
            free(s.boundaries);
            free(s.below);
            free(sums.single);
            s.boundaries = malloc(job->k * sizeof(float));
            s.below = malloc(most_cells(job->k) * sizeof(uint16_t));
            sums.single = malloc(8 * job->k * sizeof(Pair));
            if (!s.boundaries || !s.below || !sums.single) {
                ok = 0;
                break;
            }
        }
        int64_t most = s.k > job->k ? s.k : job->k;
        s.k = job->k;
        for (; first < last && first < job->parts; first++)
            run_part(operation, job, first, &s, sums, &pairs);
        s.k = most;
        first -= job->parts;
        last -= job->parts;
    }
    free(s.boundaries);
    free(s.below);
    free(sums.single);
    return ok;
}

static PyObject *run_jobs(PyObject *self, PyObject *args) {
    Py_buffer jobs;
    int operation, ok;
    long long first, last;
    if (!PyArg_ParseTuple(args, "iy*LL", &operation, &jobs, &first, &last)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    ok = run_parts(operation, jobs.buf, jobs.len / (Py_ssize_t)sizeof(Job), first, last);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&jobs);
    if (!ok) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* Add the later parts' sums and totals to the first, in order. */
static void add_parts(const Job *job) {
    for (int64_t part = 1; part < job->parts; part++) {
        for (int64_t j = 0; job->counts && job->groups == 1 && j < job->k; j++) {
            job->counts[j] += job->counts[part * job->k + j];
            job->sums[j] += job->sums[part * job->k + j];
        }
        for (int t = 0; t < 2; t++) job->totals[t] += job->totals[2 * part + t];
    }
}

/* Sum of squared deviations of all weights from their mean.
 *
 * For nearest-2 it follows from the sums by cluster. Where a codebook lies so far off that this
 * would cancel, and for nearest-1, it takes a pass of its own.
 */
static double deviations(const Job *job) {
    double size = (double)job->groups * (double)job->members, mean = 0, spread = job->totals[0];
    int64_t count = job->groups * job->k;
    if (job->power == 2) {
        for (int64_t j = 0; j < count; j++)
            mean += job->codebook[j] * job->counts[j] + job->sums[j];
        mean /= size;
        for (int64_t j = 0; j < count; j++) {
            double away = job->codebook[j] - mean;
            spread += away * (away * job->counts[j] + 2 * job->sums[j]);
        }
        if (!(spread < 1e-6 * job->totals[0])) return spread;
    }
    double sum[8] = {0}, squares[8] = {0}, total = 0;
    moments(job, 0, job->groups * job->members, sum, squares);
    for (int l = 0; l < 8; l++) total += sum[l];
    spread = -total * total / size;
    for (int l = 0; l < 8; l++) spread += squares[l];
    return spread < 0 ? 0 : spread;
}

/* Finish jobs of which all parts have run. */
static PyObject *combine(PyObject *self, PyObject *args) {
    Py_buffer buffer;
    int operation;
    if (!PyArg_ParseTuple(args, "iy*", &operation, &buffer)) return NULL;
    const Job *jobs = buffer.buf;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < buffer.len / (Py_ssize_t)sizeof(Job); i++) {
        add_parts(jobs + i);
        if (operation == MEASURE) jobs[i].totals[1] = deviations(jobs + i);
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&buffer);
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
    {"run", run_jobs, METH_VARARGS, NULL},
    {"combine", combine, METH_VARARGS, NULL},
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
