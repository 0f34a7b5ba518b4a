"""Weights that stay packed indices and codebooks in memory, and the layers that compute so."""

from ._layers import PACKED as PACKED
from ._layers import Activations as Activations
from ._layers import PackedWeight as PackedWeight
from ._layers import attach as attach
from ._layers import detach as detach
from ._layers import is_compressed as is_compressed
from ._layers import set_activations as set_activations
from ._layers import weight_name as weight_name
from ._layers import why_dense as why_dense
from ._layers import why_float as why_float
from ._spared import MOST_SPARED as MOST_SPARED
from ._spared import is_convolution as is_convolution
from ._spared import spared as spared
