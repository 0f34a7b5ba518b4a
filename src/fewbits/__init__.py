"""Train PyTorch networks whose weights cluster on a few learned values."""

from importlib.metadata import version as _version

from . import compressed as compressed
from . import export as export
from . import regularizers as regularizers
from . import schedules as schedules
from ._allocate import allocate as allocate
from ._clustering import Clustering as Clustering
from ._errors import CodebookError as CodebookError
from ._errors import FewbitsError as FewbitsError
from ._errors import FileError as FileError
from ._errors import PlanError as PlanError
from ._file import save as save
from ._finetune import finetune_codebooks as finetune_codebooks
from ._finetune import reestimate_batch_norm as reestimate_batch_norm
from ._gap import Gap as Gap
from ._loading import load as load
from ._plan import Plan as Plan
from ._plan import plan as plan
from ._pull import Penalty as Penalty
from ._pull import Proximal as Proximal
from ._quantize import quantize as quantize
from ._summary import Summary as Summary
from ._summary import summary as summary

__all__ = [
    "Clustering",
    "CodebookError",
    "FewbitsError",
    "FileError",
    "Gap",
    "Penalty",
    "Plan",
    "PlanError",
    "Proximal",
    "Summary",
    "allocate",
    "compressed",
    "export",
    "finetune_codebooks",
    "load",
    "plan",
    "quantize",
    "reestimate_batch_norm",
    "regularizers",
    "save",
    "schedules",
    "summary",
]
__version__ = _version("fewbits")
