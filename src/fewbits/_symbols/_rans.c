/* Range asymmetric numeral systems: the compiled twin of `encode` and `decode` in _numpy.py. */
#include "_native.h"

#define LOW_STATE (1ull << 32) /* a coder's state lies in [2^32, 2^64) between two symbols */
#define MOST_LANES 256
#define MOST_PRECISION 16

typedef struct {
    uint32_t share, below; /* of 2^precision: this symbol's slots, and those of all before it */
} Slots;

/* The slots of one context; 0 if they do not add up to 2^precision. */
static int slots_of(const uint32_t *shares, Py_ssize_t k, int precision, Slots *slots) {
    uint64_t below = 0;
    for (Py_ssize_t s = 0; s < k; s++) {
        slots[s].share = shares[s];
        slots[s].below = (uint32_t)below;
        below += shares[s];
        if (below > 1u << precision) return 0;
    }
    return below == 1u << precision;
}

static int stream_fits(Py_ssize_t n, const Py_buffer *lengths, const Py_buffer *shares,
                       Py_ssize_t k, int precision, Py_ssize_t lanes) {
    Py_ssize_t contexts = lengths->len / 8, total = 0;
    if (k < 1 || k > 65536 || precision < 1 || precision > MOST_PRECISION || lanes < 1
        || lanes > MOST_LANES || shares->len != 4 * contexts * k)
        return 0;
    for (Py_ssize_t c = 0; c < contexts; c++) {
        int64_t length = ((const int64_t *)lengths->buf)[c];
        if (length < 0 || length > n - total) return 0;
        total += length;
    }
    return total == n;
}

/* Encode backwards, words from the end of `words` down; returns the first, or NULL. */
static uint32_t *encode_all(const uint16_t *symbols, Py_ssize_t n, const int64_t *lengths,
                            Py_ssize_t contexts, const uint32_t *shares, Py_ssize_t k,
                            int precision, Py_ssize_t lanes, Slots *slots, uint64_t *state,
                            uint32_t *words, Py_ssize_t room) {
    uint32_t *to = words + room;
    const uint16_t *symbol = symbols + n;
    for (Py_ssize_t l = 0; l < lanes; l++) state[l] = LOW_STATE;
    for (Py_ssize_t c = contexts - 1; c >= 0; c--) {
        if (!lengths[c]) continue;
        if (!slots_of(shares + c * k, k, precision, slots)) return NULL;
        Py_ssize_t lane = lengths[c] % lanes;
        for (int64_t i = lengths[c]; i; i--) {
            lane = (lane ? lane : lanes) - 1;
            uint16_t s = *--symbol;
            if (s >= k || !slots[s].share) return NULL;
            uint64_t x = state[lane], share = slots[s].share;
            if (x >> (64 - precision) >= share) {
                if (to == words) return NULL;
                *--to = (uint32_t)x;
                x >>= 32;
            }
            uint64_t quotient = x / share;
            state[lane] = (quotient << precision) + (x - quotient * share) + slots[s].below;
        }
    }
    return to;
}

PyObject *encode(PyObject *self, PyObject *args) {
    Py_buffer symbols, lengths, shares;
    Py_ssize_t k, lanes;
    int precision;
    if (!PyArg_ParseTuple(args, "y*y*y*nin", &symbols, &lengths, &shares, &k, &precision, &lanes))
        return NULL;
    Py_ssize_t n = symbols.len / 2;
    PyObject *result = NULL;
    Slots *slots = NULL;
    uint32_t *words = NULL, *first = NULL;
    uint64_t state[MOST_LANES];
    if (!stream_fits(n, &lengths, &shares, k, precision, lanes)) {
        refuse("encode: wrong sizes");
        goto done;
    }
    slots = malloc(k * sizeof(Slots));
    /* A symbol adds at most `precision` bits and a rounding to what the words hold. */
    Py_ssize_t room = n / 32 * (precision + 1) + precision + 2 + lanes;
    words = malloc(room * sizeof(uint32_t));
    if (!slots || !words) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    first = encode_all(symbols.buf, n, lengths.buf, lengths.len / 8, shares.buf, k, precision,
                       lanes, slots, state, words, room);
    Py_END_ALLOW_THREADS
    if (!first) {
        refuse("encode: a symbol has no share, or shares do not add up");
        goto done;
    }
    result = PyBytes_FromStringAndSize(NULL, 8 * lanes + 4 * (words + room - first));
    if (result) {
        char *to = PyBytes_AsString(result);
        memcpy(to, state, 8 * lanes);
        memcpy(to + 8 * lanes, first, 4 * (words + room - first));
    }
done:
    free(slots);
    free(words);
    PyBuffer_Release(&symbols);
    PyBuffer_Release(&lengths);
    PyBuffer_Release(&shares);
    return result;
}

/* Decode one context's symbols; returns the next word, or NULL where the words end too early. */
static const uint32_t *decode_context(const uint32_t *word, const uint32_t *end, int64_t length,
                                      const Slots *slots, const uint16_t *symbol_at,
                                      int precision, Py_ssize_t lanes, uint64_t *state,
                                      uint16_t *out) {
    uint64_t mask = (1u << precision) - 1;
    while (length) {
        Py_ssize_t step = length < lanes ? (Py_ssize_t)length : lanes;
        if (end - word < step) { /* every symbol may take a word: near the end, look each time */
            for (Py_ssize_t l = 0; l < step; l++) {
                uint64_t x = state[l];
                uint32_t s = symbol_at[x & mask];
                x = slots[s].share * (x >> precision) + (x & mask) - slots[s].below;
                if (x < LOW_STATE) {
                    if (word == end) return NULL;
                    x = x << 32 | *word++;
                }
                state[l] = x;
                *out++ = (uint16_t)s;
            }
        } else {
            for (Py_ssize_t l = 0; l < step; l++) {
                uint64_t x = state[l];
                uint32_t s = symbol_at[x & mask];
                x = slots[s].share * (x >> precision) + (x & mask) - slots[s].below;
                uint64_t more = x < LOW_STATE, longer = x << 32 | *word;
                state[l] = more ? longer : x;
                word += more;
                *out++ = (uint16_t)s;
            }
        }
        length -= step;
    }
    return word;
}

/* 1 done, 0 shares that do not add up, -1 words that do not fit the symbols. */
static int decode_all(const unsigned char *data, Py_ssize_t size, const int64_t *lengths,
                      Py_ssize_t contexts, const uint32_t *shares, Py_ssize_t k, int precision,
                      Py_ssize_t lanes, Slots *slots, uint16_t *symbol_at, uint32_t *words,
                      uint16_t *out) {
    uint64_t state[MOST_LANES];
    memcpy(state, data, 8 * lanes);
    memcpy(words, data + 8 * lanes, size - 8 * lanes);
    const uint32_t *word = words, *end = words + (size - 8 * lanes) / 4;
    for (Py_ssize_t l = 0; l < lanes; l++)
        if (state[l] < LOW_STATE) return -1;
    for (Py_ssize_t c = 0; c < contexts; c++) {
        if (!lengths[c]) continue;
        if (!slots_of(shares + c * k, k, precision, slots)) return 0;
        for (Py_ssize_t s = 0; s < k; s++)
            for (uint32_t i = 0; i < slots[s].share; i++)
                symbol_at[slots[s].below + i] = (uint16_t)s;
        word = decode_context(word, end, lengths[c], slots, symbol_at, precision, lanes, state,
                              out);
        if (!word) return -1;
        out += lengths[c];
    }
    for (Py_ssize_t l = 0; l < lanes; l++)
        if (state[l] != LOW_STATE) return -1;
    return word == end ? 1 : -1;
}

PyObject *decode(PyObject *self, PyObject *args) {
    Py_buffer data, lengths, shares, symbols;
    Py_ssize_t k, lanes;
    int precision, outcome = 0;
    if (!PyArg_ParseTuple(args, "y*y*y*ninw*", &data, &lengths, &shares, &k, &precision, &lanes,
                          &symbols))
        return NULL;
    PyObject *result = NULL;
    Slots *slots = NULL;
    uint16_t *symbol_at = NULL;
    uint32_t *words = NULL;
    if (!stream_fits(symbols.len / 2, &lengths, &shares, k, precision, lanes)
        || data.len < 8 * lanes || data.len % 4) {
        refuse("decode: wrong sizes");
        goto done;
    }
    slots = malloc(k * sizeof(Slots));
    symbol_at = malloc(sizeof(uint16_t) << precision);
    words = malloc(data.len - 8 * lanes + 4); /* aligned, whatever the buffer's start is */
    if (!slots || !symbol_at || !words) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    outcome = decode_all(data.buf, data.len, lengths.buf, lengths.len / 8, shares.buf, k,
                         precision, lanes, slots, symbol_at, words, symbols.buf);
    Py_END_ALLOW_THREADS
    if (outcome == 1) {
        Py_INCREF(Py_None);
        result = Py_None;
    } else {
        refuse(outcome ? "the words do not fit the symbols" : "the shares do not add up");
    }
done:
    free(slots);
    free(symbol_at);
    free(words);
    PyBuffer_Release(&data);
    PyBuffer_Release(&lengths);
    PyBuffer_Release(&shares);
    PyBuffer_Release(&symbols);
    return result;
}
