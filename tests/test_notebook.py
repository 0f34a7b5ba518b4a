"""What Jupyter shows: the quickstart's cells run, and tables have a cell for what is printed."""

import importlib.util
import json
import re
from html import unescape
from pathlib import Path

import pytest
from helpers import two_layers
from torch import nn

import fewbits

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
    assert len(tables) == 3
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
