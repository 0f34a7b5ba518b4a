"""Use an installed fewbits as a stranger would, and look at what was installed."""

import importlib.metadata
import re
import sys
from pathlib import Path

import torch

before = set(sys.modules)  # what torch itself loads, where it is there: tqdm
import fewbits  # noqa: E402

OPTIONAL = {"click", "filelock", "jinja2", "matplotlib", "onnx", "optuna", "sklearn", "tqdm"}
loaded = {name.partition(".")[0] for name in sys.modules.keys() - before}
assert not loaded & OPTIONAL, loaded & OPTIONAL

folder = Path(fewbits.__file__).parent
files = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
size = sum(path.stat().st_size for path in files)
compiled = sorted(path.parent.name for path in files if path.suffix in (".so", ".pyd"))
version = importlib.metadata.version("fewbits")
assert version == fewbits.__version__
assert re.match(rf"fewbits-{re.escape(version)}[-.]", sys.argv[1]), sys.argv[1]
assert (folder / "py.typed").exists()
assert size < 1_000_000, size

torch.manual_seed(0)
model = torch.nn.Linear(64, 32)
clustering = fewbits.Clustering(model, bits=2)
optimizer = torch.optim.SGD(clustering.param_groups(lr=0.1))
for _ in range(3):
    (model(torch.randn(8, 64)).square().mean() + clustering.loss()).backward()
    optimizer.step()
    optimizer.zero_grad()
    clustering.step()
clustering.harden()
fewbits.save(model, "model.fewbits")
again = fewbits.load("model.fewbits", into=torch.nn.Linear(64, 32))
assert torch.equal(again.weight, model.weight)
print(
    f"{sys.argv[1]}: {size:,} bytes installed, compiled: {', '.join(compiled) or 'nothing'};"
    f" Python {sys.version.split()[0]}, torch {torch.__version__}"
)
