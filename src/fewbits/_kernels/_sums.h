/* Sums by cluster in float32 over a few blocks, added up in float64; included by _native.c. */

/* Of up to 4 clusters, by lane: sums, and how many weights are in it or a higher one. */
typedef struct {
    float sums[4][8];
    uint32_t counts[4][8];
} Few;

/* Return the number, or 0; no branch, which would be taken at random. */
static inline float only_if(int wanted, float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    bits &= 0u - (uint32_t)wanted;
    memcpy(&number, &bits, 4);
    return number;
}

static void add_few(const Few *few, int64_t k, const Sums *sums) {
    double sum[4] = {0}, count[5] = {0};
    for (int j = 0; j < k; j++)
        for (int l = 0; l < 8; l++) {
            sum[j] += few->sums[j][l];
            count[j] += few->counts[j][l];
        }
    for (int j = 0; j < k; j++) {
        sums->single[j * sums->lanes].sum += sum[j];
        sums->single[j * sums->lanes].count += count[j] - count[j + 1];
    }
}

/* Add what was summed in float32, and clear it. */
static void add_narrow(const Sums *sums, int64_t k) {
    float *from = sums->narrow;
    if (sums->kind == ONES)
        for (int64_t j = 0; j < sums->lanes * k; j++) {
            sums->single[j].sum += from[2 * j];
            sums->single[j].count += from[2 * j + 1];
            from[2 * j] = from[2 * j + 1] = 0;
        }
    if (sums->kind != PAIRS) return;
    double all[TREE][2] = {{0}};
    for (int high = 0; high < k; high++) {
        double sum = 0, count = 0;
        for (int low = 0; low < k; low++) {
            float *own = from + 8 * (low | high << 4);
            double both = (double)own[2] + own[6];
            all[low][0] += (double)own[0] + own[4];
            all[low][1] += both;
            sum += (double)own[1] + own[5];
            count += both;
            memset(own, 0, 8 * sizeof(float));
        }
        sums->single[high * sums->lanes].sum += sum;
        sums->single[high * sums->lanes].count += count;
    }
    for (int j = 0; j < k; j++) {
        sums->single[j * sums->lanes].sum += all[j][0];
        sums->single[j * sums->lanes].count += all[j][1];
    }
}
