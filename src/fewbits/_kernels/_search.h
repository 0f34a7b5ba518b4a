/* How one row's representatives will be found: the tree or the grid that `locate` reads. Included
 * by _native.c after the portable passes.
 */

static void plant(Search *s) {
    float b[TREE], c[TREE];
    for (int j = 0; j < TREE; j++) {
        b[j] = j < s->k - 1 ? s->boundaries[j] : INFINITY;
        c[j] = s->codebook[j < s->k ? j : s->k - 1];
    }
    s->tree[0] = b[7];
    s->tree[1] = b[3];
    s->tree[2] = b[11];
    for (int t = 0; t < 8; t++) {
        int back = (8 - t) & 7;
        s->tree[8 + back] = b[(4 * t + 1) & 15];
        s->tree[16 + back] = b[2 * t];
        s->tree[24 + back] = c[t];
        s->tree[32 + back] = c[8 + t];
    }
}

static int64_t most_cells(int64_t k) { return 64 * k < MOST_CELLS ? 64 * k : MOST_CELLS; }

/* Lay an even grid over the boundaries, fine enough that a cell holds one of them, or a few. */
static void lay_grid(Search *s, int64_t members) {
    int64_t count = s->k - 1;
    int32_t cell[BLOCK];
    s->cells = 0;
    for (int64_t cells = 4 * s->k; cells <= most_cells(s->k) && 4 * cells <= members; cells *= 4) {
        s->low = s->boundaries[0];
        s->per_unit = (float)(cells - 2) / (s->boundaries[count - 1] - s->low);
        if (!isfinite(s->per_unit)) {
            s->cells = 0;
            return;
        }
        s->cells = (int)cells;
        s->most = 0;
        int64_t next = 0;
        for (int64_t j = 0; j < count; j += BLOCK) {
            int n = count - j < BLOCK ? (int)(count - j) : BLOCK, run = 0;
            cells_portable(s, s->boundaries + j, n, cell);
            for (int i = 0; i < n; i++) {
                run = next > cell[i] ? run + 1 : 1;
                for (; next <= cell[i]; next++) s->below[next] = (int32_t)(j + i);
                if (run > s->most) s->most = run;
            }
        }
        for (; next < cells; next++) s->below[next] = (int32_t)count;
        if (s->most == 1) return;
    }
    if (s->cells && s->most <= 4) return; /* the finest that pays */
    s->cells = 0;
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
    if (job->k <= TREE) plant(s);
    else lay_grid(s, job->members);
}
