"""Runs of least squared error against every other way to cut, and compiled against NumPy."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.backends import COMPILED

from fewbits._kernels import _runs, best_runs

IMPLEMENTATIONS = [_runs.best_runs, *([best_runs] if COMPILED else [])]

# As a histogram has them: weights in each point, some without any, and their values.
points = st.lists(st.tuples(st.integers(0, 3), st.integers(-4, 4)), min_size=1, max_size=7)


def prefix_sums(values, counts):
    """Sums of the weights before each point, (1, M + 1): counts, sums, squares."""
    of_points = counts, values * counts, values**2 * counts
    return [np.concatenate([[0.0], np.cumsum(a)])[None] for a in of_points]


def squared_error(values, counts, bounds):
    error = 0.0
    for start, stop in itertools.pairwise(bounds):
        repeated = np.repeat(values[start:stop], counts[start:stop].astype(int))
        error += ((repeated - repeated.mean()) ** 2).sum() if len(repeated) else 0.0
    return error


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(points, st.integers(1, 4))
def test_no_other_cut_has_a_lower_error(implementation, some, k):
    ordered = sorted(some, key=lambda p: p[1])
    counts, values = (np.array(a, dtype=float) for a in zip(*ordered, strict=True))
    starts = implementation(*prefix_sums(values, counts), k)
    bounds = [*starts[0].tolist(), len(values)]
    assert bounds[0] == 0 and bounds == sorted(bounds)
    cuts = itertools.combinations_with_replacement(range(len(values) + 1), k - 1)
    least = min(squared_error(values, counts, [0, *sorted(cut), len(values)]) for cut in cuts)
    assert squared_error(values, counts, bounds) <= least + 1e-9  # squares of small integers


@pytest.mark.skipif(not COMPILED, reason="built without a C compiler")
@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 300), st.integers(1, 40))
def test_compiled_runs_begin_where_those_of_numpy_do(seed, groups, width, k):
    random = np.random.default_rng(seed)
    counts = random.integers(0, 3, (groups, width)).astype(float)
    # With many equal values, so that there are ties.
    values = np.sort(random.standard_normal((groups, width)).round(random.integers(0, 9)), axis=1)
    of_points = counts, counts * values, counts * values**2
    before = [np.pad(np.cumsum(a, axis=1), ((0, 0), (1, 0))) for a in of_points]
    assert np.array_equal(_runs.best_runs(*before, k=k), best_runs(*before, k=k))
