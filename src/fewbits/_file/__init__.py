"""The model file: a safetensors container with codebooks and coded indices, safe to open."""

from ._atomic import TEMPORARY as TEMPORARY
from ._atomic import fill_atomically as fill_atomically
from ._atomic import write_atomically as write_atomically
from ._coders import Choice as Choice
from ._format import NAMES as NAMES
from ._format import Header as Header
from ._format import dtype_name as dtype_name
from ._load import Reader as Reader
from ._load import check_tied as check_tied
from ._load import find_targets as find_targets
from ._load import load as load
from ._load import reading as reading
from ._parallel import Progress as Progress
from ._save import Tensors as Tensors
from ._save import is_weight as is_weight
from ._save import save as save
from ._save import write as write
