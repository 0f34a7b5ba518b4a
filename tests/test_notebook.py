"""What Jupyter shows: the quickstart runs, tables have what is printed, plots what was logged."""

import importlib.util
import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import torch
from helpers import two_layers
from torch import nn

import fewbits
from fewbits.integrations.notebook import LivePlot

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "docs" / "quickstart.ipynb"


def runner():
    spec = importlib.util.spec_from_file_location("runner", ROOT / "benchmarks" / "notebook.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(notebook):
    """The kinds of what each code cell shows."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [[sorted(out.get("data", ["printed"])) for out in cell["outputs"]] for cell in cells]


def test_the_quickstart_runs_and_shows_what_it_keeps():
    kept = json.loads(QUICKSTART.read_text())
    found = runner().executed(kept)
    assert shown(found) == shown(kept)
    tables = [kinds for kinds in shown(found) if ["text/html", "text/plain"] in kinds]
    assert len(tables) == 4
    last = found["cells"][-2]["outputs"][0]["text"]
    assert float(re.findall(r"accuracy ([\d.]+)%", last)[0]) > 95


def test_a_cell_that_fails_is_an_error():
    cell = {"cell_type": "code", "source": ["1 / 0"]}
    with pytest.raises(ZeroDivisionError):
        runner().executed({"cells": [cell]})


@pytest.mark.slow
def test_the_quickstart_runs_in_jupyter():
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    nbclient.NotebookClient(nbformat.read(QUICKSTART, as_version=4)).execute()


def curves(html):
    """Name to (x, y) of the points that hovering tells, by chart."""
    found = re.findall(r"<span>([^<]+) at ([^:<]+): ([^<]+)</span>", html)
    names = dict.fromkeys(name for name, _, _ in found)
    return {name: [(float(x), float(y)) for n, x, y in found if n == name] for name in names}


def test_a_live_plot_draws_what_was_logged():
    plot = LivePlot()
    plot.log({"loss": 2.0, "a < b": torch.tensor(0.5)})
    plot.log({"loss": float("nan")})
    plot.log({"loss": 1.0}, step=10)
    html = plot._repr_html_()
    assert curves(html) == {"loss": [(0, 2), (10, 1)], "a &lt; b": [(0, 0.5)]}
    assert html.count("<svg") == 2 and "a < b" not in html
    assert str(plot) == "LivePlot of loss, a < b, 3 steps"


def test_a_long_curve_keeps_its_ends_and_stays_light():
    plot = LivePlot()
    for step in range(10_001):
        plot.log({"loss": step})
    found = curves(plot._repr_html_())["loss"]
    assert found[0] == (0, 0) and found[-1] == (10_000, 10_000) and len(found) <= 101


def test_a_script_keeps_values_and_shows_nothing():
    code = "import sys; from fewbits.integrations.notebook import LivePlot as P; p = P()\n"
    code += "p.log({'loss': 1.0}); p.show(); print('IPython' in sys.modules, p)"
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said == "False LivePlot of loss, 1 step\n"


@pytest.mark.filterwarnings("ignore")  # of IPython's own about where it keeps its history
def test_a_notebook_gets_one_display_that_is_updated():
    pytest.importorskip("IPython", reason="needs IPython")
    code = """
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
InteractiveShell.instance()
from fewbits.integrations.notebook import LivePlot
with capture_output() as shown:
    plot = LivePlot(every=0)
    for value in (3.0, 2.0, 1.0):
        plot.log({"loss": value})
    LivePlot(every=1e9).log({"loss": 1.0})
    slow = LivePlot(every=1e9)
    for value in (3.0, 2.0, 1.0):
        slow.log({"loss": value})
    slow.show()
for out in shown.outputs:
    print(out.data["text/html"].count(" at "), out.transient["display_id"], out.update)
"""
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    rows = [line.split() for line in said.splitlines()]
    first, other, slow = (rows[n][1] for n in (0, 3, 4))
    assert len({first, other, slow}) == 3
    assert rows == [
        ["1", first, "False"], ["2", first, "True"], ["3", first, "True"],
        ["1", other, "False"], ["1", slow, "False"], ["3", slow, "True"],
    ]  # fmt: skip


def cells(html):
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [[unescape(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


@pytest.mark.parametrize("what", ["plan", "gap", "summary"])
def test_a_table_shows_what_is_printed(what):
    model = two_layers()
    if what == "plan":
        found = fewbits.plan(model, bits=1)
    elif what == "gap":
        found = fewbits.Clustering(model, bits=1).gap()
    else:
        fewbits.quantize(model, bits=1)
        found = fewbits.summary(model)
    rows = cells(found._repr_html_())
    printed = str(found).splitlines()
    for row, line in zip(rows, printed, strict=False):
        assert [c for c in row if c] == line.split()
    assert [row[0] for row in rows[1:3]] == ["0.weight", "2.weight"]
    if what != "gap":
        assert printed[-1] in found._repr_html_()


def test_names_are_escaped():
    model = nn.ModuleDict({"<b>": nn.Linear(4, 4, bias=False), "&": nn.Linear(4, 4)})
    html = fewbits.plan(model, bits=1)._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;.weight" in html
    assert "<details><summary>1 tensors left alone" in html
