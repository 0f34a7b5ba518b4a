"""The launches of `_triton`. Each runs over the parts of many weights; a program takes one part.

A program is one warp and takes its part tile by tile, `TILE` weights at a time. That is 32 a lane:
enough loads in flight to keep the memory busy, and a sum over a tile is 31 additions in a lane and
five shuffles, with no barrier. Sums within a tile are in float32, sums of tiles in float64. Each
program writes to places of its own, and `combine` adds those up in order: there are no atomics.

What a boundary or a representative is read for lies in the first-level cache: there are few.
"""

# A kernel is written in Triton's Python, where `constexpr` is what a checker cannot follow.
# pyright: reportMissingImports=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

TILE = tl.constexpr(1024)
# Up to this many values a weight is compared with every boundary, two operations each; from there
# on bisection is less work, a load and three operations for each bit of the index.
COMPARED = tl.constexpr(16)
# Clusters that a program sums, each by a mask of its own: four operations a weight and cluster.
# Where there are more, several programs read the same part.
SUMMED = tl.constexpr(64)

# A row of the table of weights: which program is its first, where things are, and its shape.
FIRST = tl.constexpr(0)
WEIGHT = tl.constexpr(1)  # an address
NUMBER = tl.constexpr(2)  # which weight of the call it is
ROW = tl.constexpr(3)  # its first row of the codebook
GROUPS = tl.constexpr(4)
MEMBERS = tl.constexpr(5)
PARTS = tl.constexpr(6)  # parts that a row is cut into
TILES = tl.constexpr(7)  # tiles in a part
COUNTS = tl.constexpr(8)  # where its counts go, (groups, k, parts); in the results if parts is 1
SUMS = tl.constexpr(9)
TOTALS = tl.constexpr(10)  # where its totals go, (3, blocks x parts)
FIELDS = tl.constexpr(11)

# A row of the table of runs of partial sums, each to be added up.
RUN = tl.constexpr(1)  # where the first run begins
LENGTH = tl.constexpr(2)  # of a run
TO = tl.constexpr(3)  # where in the results the first sum goes
SIZE = tl.constexpr(4)  # 0; or these are the three totals of so many weights
RUN_FIELDS = tl.constexpr(5)

MEASURE, CLUSTER_SUMS, MOMENTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ASSIGN, SNAP, PULL, MOVE = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)


@triton.jit
def _own_row(table, rows, levels, WIDTH: tl.constexpr):
    """Return the row of the table that this program works for, and its number within that."""
    program = tl.program_id(0).to(tl.int64)
    at = tl.full([], 0, tl.int32)
    for level in range(levels):
        probe = at + (1 << (levels - 1 - level))
        first = tl.load(table + probe * WIDTH, mask=probe < rows, other=program + 1)
        at = tl.where(first <= program, probe, at)
    row = table + at * WIDTH
    return row, program - tl.load(row)


@triton.jit
def _address(table, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return an address from a table as a pointer."""
    address = tl.load(table).to(tl.pointer_type(TYPE))
    if ALIGNED:  # to 16 bytes, so that four loads or more become one
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _tile(row, block, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Return where a tile begins, how far from there each weight is, and which are inside."""
    groups, members = tl.load(row + GROUPS), tl.load(row + MEMBERS)
    if ALIGNED:
        members = tl.multiple_of(members, 16)
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    # 32 bits will do within a tile, and only there.
    rows_left = tl.minimum(groups - block * ROWS, ROWS).to(tl.int32)
    columns_left = tl.minimum(members - tile * COLUMNS, COLUMNS).to(tl.int32)
    inside = (r < rows_left) & (c < columns_left)
    if ROWS == 1:
        offset = r + c
    else:  # a tile of several rows has them whole, so they are short
        offset = r * members.to(tl.int32) + c
    return block * ROWS * members + tile * COLUMNS, offset, inside, rows_left * columns_left


@triton.jit
def _search(w, boundaries, own, there, inside, k, K: tl.constexpr):
    """Return how many boundaries lie below each weight; `own` is where each row's begin."""
    index = tl.zeros(w.shape, tl.int32)
    if K <= COMPARED:
        for j in tl.static_range(K - 1):
            known = there & (own + j < own + k - 1)
            boundary = tl.load(boundaries + own + j, mask=known, other=float("inf"))
            index = tl.where(w > boundary, j + 1, index)  # they ascend: the last one counts
    else:
        # The largest index whose boundary lies below, bit by bit from the highest.
        for bit in tl.static_range(1, 17):
            if K >> bit > 0:
                probe = index + (K >> bit)
                boundary = tl.load(
                    boundaries + own + probe - 1, mask=inside & (probe < k), other=float("inf")
                )
                index = tl.where(w > boundary, probe, index)
    return index


@triton.jit
def _index(  # noqa: PLR0913  # a launch's own arguments, handed on
    w, row, block, inside, boundaries, k, stride, K: tl.constexpr, ROWS: tl.constexpr
):
    """Return each weight's index."""
    first = tl.load(row + ROW) + block * ROWS
    r = tl.arange(0, ROWS)[:, None]
    there = r < tl.load(row + GROUPS) - block * ROWS
    return _search(w, boundaries + first * stride, r * stride, there, inside, k, K)


@triton.jit
def _nearest(index, row, block, inside, codebook, k, ROWS: tl.constexpr):
    """Return the representative of each index."""
    first = tl.load(row + ROW) + block * ROWS
    own = tl.arange(0, ROWS)[:, None] * k
    return tl.load(codebook + first * k + (own + index), mask=inside, other=0.0)


@triton.jit
def _moved(w, nearest, amount, POWER: tl.constexpr):
    """Return the weights moved towards their representatives."""
    if POWER == 2:
        # From the nearer end, so that the whole way ends on the representative itself.
        way = nearest - w
        moved = tl.where(amount < 0.5, w + amount * way, nearest - way * (1 - amount))
    else:
        away = w - nearest
        left = tl.where(away > 0, away - amount, away + amount)
        moved = nearest + tl.where(tl.abs(away) <= amount, 0.0, left)
    return moved


@triton.jit
def _add(index, value, summed, counted, S: tl.constexpr):
    """Return the sums and counts of S clusters with one tile's added."""
    slots = tl.arange(0, S)[None, :]
    step: tl.constexpr = S if S < 4 else 4
    # Four at a time: their shuffles overlap, and the code stays small.
    for first in range(0, S, step):
        for j in tl.static_range(step):
            member = index == first + j
            sums = tl.sum(tl.where(member, value, 0.0), axis=1, keep_dims=True)
            counts = tl.sum(member.to(tl.int32), axis=1, keep_dims=True)
            summed += tl.where(slots == first + j, sums.to(tl.float64), 0.0)
            counted += tl.where(slots == first + j, counts, 0)
    return summed, counted


@triton.jit(do_not_specialize=["weights", "levels", "k", "stride"])
def sums(  # noqa: PLR0913  # what a launch has is given one by one
    table,
    weights,
    levels,
    codebook,  # (rows, k) float32, the rows of all weights one after the other
    boundaries,  # float32, `stride` from one row to the next
    k,
    stride,
    others,  # addresses of what to sum or write, one a weight
    amounts,  # float64, one a weight
    results,
    partial,
    OPERATION: tl.constexpr,
    POWER: tl.constexpr,
    TYPE: tl.constexpr,
    OTHER_TYPE: tl.constexpr,
    K: tl.constexpr,  # k, rounded up to a power of two
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Sum over each cluster of one part of one weight, and over all of it, as asked for.

    MOVE sums what is left of the way, and writes the moved weights where one program sees all
    clusters: others would read what it wrote.
    """
    row, program = _own_row(table, weights, levels, FIELDS)
    S: tl.constexpr = K if K < SUMMED else SUMMED
    chunks: tl.constexpr = 1 if OPERATION == MOMENTS else K // S
    chunk = (program % chunks).to(tl.int32)
    program = program // chunks
    parts, tiles = tl.load(row + PARTS), tl.load(row + TILES)
    block, part = program // parts, program % parts
    weight = _address(row + WEIGHT, TYPE, ALIGNED)
    pivot = tl.load(weight).to(tl.float32)
    slots = tl.arange(0, S)[None, :]
    counted, summed = tl.zeros([ROWS, S], tl.int32), tl.zeros([ROWS, S], tl.float64)
    total = tl.full([], 0, tl.float64)
    first, second = total, total
    end = tl.minimum((part + 1) * tiles, tl.cdiv(tl.load(row + MEMBERS), COLUMNS))
    for tile in range(part * tiles, end):
        start, offset, inside, size = _tile(row, block, tile, ROWS, COLUMNS, ALIGNED)
        w = tl.load(weight + start + offset, mask=inside, other=0.0).to(tl.float32)
        if OPERATION == MEASURE or OPERATION == MOMENTS:
            # Sums of w - pivot and its square, by way of a number near the tile's mean: squares
            # of large equal parts would drown the rest. Equal weights give exactly 0.
            near = pivot + tl.sum(tl.where(inside, w - pivot, 0.0)) / size
            away = tl.where(inside, w - near, 0.0)
            shift = near.to(tl.float64) - pivot.to(tl.float64)
            some = tl.sum(away).to(tl.float64)
            first += some + size * shift
            second += tl.sum(away * away).to(tl.float64) + shift * (2 * some + size * shift)
        if OPERATION != MOMENTS:
            index = _index(w, row, block, inside, boundaries, k, stride, K, ROWS)
            if OPERATION == CLUSTER_SUMS:
                other = _address(others + tl.load(row + NUMBER), OTHER_TYPE, ALIGNED)
                value = tl.load(other + start + offset, mask=inside, other=0.0).to(tl.float32)
                if POWER == 2:
                    value = value * value
            elif OPERATION == MOVE:
                number = tl.load(row + NUMBER)
                amount = tl.load(amounts + number).to(tl.float32)
                nearest = _nearest(index, row, block, inside, codebook, k, ROWS)
                moved = _moved(w, nearest, amount, POWER)
                value = tl.where(inside, moved - nearest, 0.0)
                if chunks == 1:
                    to = _address(others + number, OTHER_TYPE, ALIGNED) + start + offset
                    tl.store(to, moved.to(OTHER_TYPE), mask=inside)
            else:
                nearest = _nearest(index, row, block, inside, codebook, k, ROWS)
                value = tl.where(inside, w - nearest, 0.0)
                if POWER == 2:
                    total += tl.sum(value * value).to(tl.float64)
                else:
                    total += tl.sum(tl.abs(value)).to(tl.float64)
                    value = (value > 0).to(tl.float32) - (value < 0).to(tl.float32)
            index = tl.where(inside, index - chunk * S, -1)
            summed, counted = _add(index, value, summed, counted, S)
    if OPERATION != MOMENTS:
        r = block * ROWS + tl.arange(0, ROWS)[:, None]
        slot = slots + chunk * S
        at = (r * k + slot) * parts + part
        there = (r < tl.load(row + GROUPS)) & (slot < k)
        to = partial
        if parts == 1:
            to = results
        tl.store(to + tl.load(row + COUNTS) + at, counted.to(tl.float64), mask=there)
        tl.store(to + tl.load(row + SUMS) + at, summed, mask=there)
    if OPERATION == MEASURE or OPERATION == MOMENTS:
        blocks = tl.cdiv(tl.load(row + GROUPS), ROWS)
        to = partial + tl.load(row + TOTALS) + program
        tl.store(to, total, mask=chunk == 0)
        tl.store(to + blocks * parts, first, mask=chunk == 0)
        tl.store(to + 2 * blocks * parts, second, mask=chunk == 0)


@triton.jit
def _run(partial, length):
    """Return the sum of `length` numbers, always in the same order."""
    lane = tl.arange(0, TILE)
    found = tl.zeros([TILE], tl.float64)
    for start in range(0, length, TILE):
        found += tl.load(partial + start + lane, mask=lane < length - start, other=0.0)
    return tl.sum(found)


@triton.jit(do_not_specialize=["runs", "levels", "weights"])
def combine(table, runs, levels, partial, results, weights):
    """Add up one run of partial sums; or the three of a weight's totals."""
    row, program = _own_row(table, runs, levels, RUN_FIELDS)
    run, length = tl.load(row + RUN), tl.load(row + LENGTH)
    to, size = results + tl.load(row + TO), tl.load(row + SIZE)
    partial += run + program * length
    if size == 0:
        tl.store(to + program, _run(partial, length))
    else:
        first = _run(partial + length, length)
        spread = _run(partial + 2 * length, length) - first * first / size
        tl.store(to, _run(partial, length))
        # Not `maximum`, which would make 0 of NaN.
        tl.store(to + weights, tl.where(spread < 0, 0.0, spread))


@triton.jit(do_not_specialize=["weights", "levels", "k", "stride"])
def apply(  # noqa: PLR0913  # as above
    table,
    weights,
    levels,
    codebook,
    boundaries,
    k,
    stride,
    others,  # addresses of what to write, one a weight
    amounts,  # float64, one a weight
    OPERATION: tl.constexpr,
    POWER: tl.constexpr,
    TYPE: tl.constexpr,
    OTHER_TYPE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write what an operation makes of each weight in one part of one of them."""
    row, program = _own_row(table, weights, levels, FIELDS)
    parts, tiles = tl.load(row + PARTS), tl.load(row + TILES)
    block, part = program // parts, program % parts
    weight = _address(row + WEIGHT, TYPE, ALIGNED)
    number = tl.load(row + NUMBER)
    out = _address(others + number, OTHER_TYPE, ALIGNED)
    if OPERATION == PULL or OPERATION == MOVE:
        amount = tl.load(amounts + number).to(tl.float32)
    end = tl.minimum((part + 1) * tiles, tl.cdiv(tl.load(row + MEMBERS), COLUMNS))
    for tile in range(part * tiles, end):
        start, offset, inside, _ = _tile(row, block, tile, ROWS, COLUMNS, ALIGNED)
        w = tl.load(weight + start + offset, mask=inside, other=0.0).to(tl.float32)
        index = _index(w, row, block, inside, boundaries, k, stride, K, ROWS)
        if OPERATION != ASSIGN:
            nearest = _nearest(index, row, block, inside, codebook, k, ROWS)
        to = out + start + offset
        if OPERATION == ASSIGN:
            found = index
        elif OPERATION == SNAP:
            found = nearest
        elif OPERATION == PULL:
            away = w - nearest
            if POWER == 1:
                away = (away > 0).to(tl.float32) - (away < 0).to(tl.float32)
            found = tl.load(to, mask=inside, other=0.0).to(tl.float32) + amount * away
        else:
            found = _moved(w, nearest, amount, POWER)
        tl.store(to, found.to(OTHER_TYPE), mask=inside)


@triton.jit(do_not_specialize=["size"])
def midpoints(codebook, boundaries, size):
    """As `_eager.midpoints`, of a flat codebook; what lies between rows is nobody's boundary."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at + 1 < size
    low = tl.load(codebook + at, mask=inside, other=0.0).to(tl.float64)
    high = tl.load(codebook + at + 1, mask=inside, other=0.0).to(tl.float64)
    exact = low + (high - low) / 2
    middle = exact.to(tl.float32)
    # The next number below: one step of the bits, away from zero where they are negative.
    bits = middle.to(tl.int32, bitcast=True)
    below = tl.where(bits > 0, bits - 1, tl.where(bits == 0, -0x7FFFFFFF, bits + 1))
    middle = tl.where(middle > exact, below.to(tl.float32, bitcast=True), middle)
    tl.store(boundaries + at, middle, mask=inside)
