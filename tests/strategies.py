"""Weights and codebooks for hypothesis: ties, duplicates, zeros, denormals, one value."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

# Few distinct numbers make ties and duplicates common; the rest is anything finite.
# A denormal that float32 has: for another value NumPy 1 says that it was flushed.
_TINY = float(np.float32(1e-40))
_special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, _TINY, -_TINY, 3.0])
_finite = st.floats(-1e3, 1e3, width=32)
numbers = st.one_of(_special, _finite)


@st.composite
def weights(draw, groups: int | None = None, least: int = 1, dtype=np.float32) -> Tensor:
    """(G, n) weights."""
    g = draw(st.integers(1, 3)) if groups is None else groups
    n = draw(st.integers(least, 40))
    return torch.from_numpy(draw(hnp.arrays(dtype, (g, n), elements=numbers)))


@st.composite
def weights_and_codebooks(draw, dtype=np.float32) -> tuple[Tensor, Tensor]:
    """(G, n) weights and (G, K) ascending codebooks; some weights lie on midpoints."""
    weight = draw(weights(dtype=dtype))
    g, n = weight.shape
    k = draw(st.integers(1, 20))
    codebook = torch.from_numpy(draw(hnp.arrays(dtype, (g, k), elements=numbers))).sort(1).values
    if k > 1 and draw(st.booleans()):
        middle = (codebook[:, :1] + codebook[:, 1:2]) / 2
        weight[:, : n // 2] = middle
    return weight, codebook
