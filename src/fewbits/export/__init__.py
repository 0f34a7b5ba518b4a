"""Models with few values for other runtimes: written, read again, run and compared with PyTorch.

One function a target. Each needs an extra of its own (`pip install 'fewbits[onnx]'`), imported
only when it is called.
"""

from ._coreml import coreml as coreml
from ._executorch import executorch as executorch
from ._onnx import onnx as onnx
from ._openvino import openvino as openvino
from ._result import Exported as Exported
from ._result import ExportedWeight as ExportedWeight

__all__ = ["Exported", "ExportedWeight", "coreml", "executorch", "onnx", "openvino"]
