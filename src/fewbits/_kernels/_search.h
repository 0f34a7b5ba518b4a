/* How one row's representatives will be found: the tree or the grid that `locate` reads. Included
 * by _native.c after the portable passes.
 */

/* Lay out a tree of up to 16 values for permutations: nodes backwards modulo 8, or modulo 4
 * where there are no more. The last level's values are in turn below and above their boundary. */
static void plant(Search *s) {
    int levels = s->k <= 4 ? 2 : s->k <= 8 ? 3 : 4, size = 1 << levels;
    float b[TREE], c[TREE];
    for (int j = 0; j < TREE; j++) {
        b[j] = j < s->k - 1 ? s->boundaries[j] : INFINITY;
        c[j] = s->codebook[j < s->k ? j : s->k - 1];
    }
    s->levels = levels;
    s->tree[0] = b[size / 2 - 1];
    s->tree[1] = b[size / 4 - 1];
    s->tree[2] = b[3 * size / 4 - 1];
    for (int t = 0; t < 8; t++) {
        int back = (8 - t) & 7;
        s->tree[8 + back] = b[levels == 3 ? 2 * t & 7 : (4 * t + 1) & 15];
        s->tree[16 + back] = b[2 * t];
        s->tree[24 + back] = c[levels == 2 ? t & 3 : levels == 3 ? t : 2 * t];
        s->tree[32 + back] = c[2 * t + 1];
    }
}

static int64_t most_cells(int64_t k) { return 64 * k < MOST_CELLS ? 64 * k : MOST_CELLS; }

/* Write the cells up to `last`, which have `j` boundaries below them. */
static int64_t write_cells(Search *s, int64_t next, int64_t last, int64_t j) {
    int64_t above = j + 1 < s->k ? j + 1 : j;
    Cell cell = {s->boundaries[j], s->codebook[j], s->codebook[above], (int32_t)j};
    for (; next <= last; next++) s->grid[next] = cell;
    return next;
}

/* Lay an even grid over the boundaries, fine enough that hardly a cell holds several. */
static void lay_grid(Search *s, int64_t members) {
    int64_t count = s->k - 1;
    int32_t cell[BLOCK];
    for (int64_t cells = 4 * s->k; cells <= most_cells(s->k) && 4 * cells <= members; cells *= 4) {
        s->cells = 0;
        s->low = s->boundaries[0];
        s->per_unit = (float)(cells - 2) / (s->boundaries[count - 1] - s->low);
        if (!isfinite(s->per_unit)) return;
        s->cells = (int)cells;
        int64_t next = 0, crowded = 0, run = 0, most = 0;
        for (int64_t j = 0; j < count; j += BLOCK) {
            int n = count - j < BLOCK ? (int)(count - j) : BLOCK;
            cells_portable(s, s->boundaries + j, n, cell);
            for (int i = 0; i < n; i++) {
                run = next > cell[i] ? run + 1 : 0;
                next = write_cells(s, next, cell[i], j + i);
                if (run) s->grid[cell[i]].below |= CROWDED;
                crowded += run > 0;
                if (run > most) most = run;
            }
        }
        write_cells(s, next, cells - 1, count);
        s->crowded = most > 0;
        if (most <= 3 && 64 * crowded <= s->k) return;
        if (most > 3) s->cells = 0; /* bisection is as fast */
    }
}

/* As `_eager.midpoints`: rounded towards minus infinity. */
static float midpoint(double low, double high) {
    double exact = low + (high - low) / 2;
    float middle = (float)exact;
    return middle > exact ? nextafterf(middle, -INFINITY) : middle;
}

static void search_row(Search *s, const Job *job, int64_t row) {
    s->codebook = job->codebook + row * job->k;
    if (job->boundaries)
        memcpy(s->boundaries, job->boundaries + row * (job->k - 1), (job->k - 1) * sizeof(float));
    else
        for (int64_t j = 0; j < job->k - 1; j++)
            s->boundaries[j] = midpoint(s->codebook[j], s->codebook[j + 1]);
    s->boundaries[job->k - 1] = INFINITY;
    s->levels = s->cells = 0;
    if (job->k <= TREE) plant(s);
    else lay_grid(s, job->members);
}
