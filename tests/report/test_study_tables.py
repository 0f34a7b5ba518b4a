"""Tables and plots of a study against sums by the statistics module, and as files others read."""

import csv
import io
import re
import statistics
import xml.etree.ElementTree as ElementTree

import pytest

from fewbits.report import _plots, _study, write_study

SVG = "{http://www.w3.org/2000/svg}"
METHODS, KS, SEEDS, STRENGTHS = ("kmeans", "penalty"), (2, 4), (0, 1, 2), (0.1, 1.0, 10.0)


def row(method: str, k: int, seed: int, strength: float) -> dict:
    accuracy = 80 + k + seed / 10 + (strength if method == "penalty" else 0) / 100
    gap = None if method == "kmeans" else seed / 10
    history = [] if gap is None else [{"epoch": 1, "hardening_gap": gap, "accuracy": accuracy}]
    return {
        "method": method, "k": k, "seed": seed, "strength": strength, "model": "convnet",
        "float_accuracy": 90 + seed, "accuracy": accuracy, "drop": 90 + seed - accuracy,
        "accuracy_before_reestimation": 70.0, "hardening_gap": gap, "bits_fixed": k / 2,
        "bits_entropy": k / 2 - 0.1, "bytes": 1000 * k, "ratio": 10 / k,
        "file_bytes": 900 * k, "seconds": 1.0, "float_bytes": 10_000, "history": history,
    }  # fmt: skip


@pytest.fixture
def results() -> dict:
    rows = [row("kmeans", k, s, 1.0) for k in KS for s in SEEDS]
    rows += [row("penalty", k, s, x) for k in KS for s in SEEDS for x in STRENGTHS]
    environment = {
        "device": "a processor", "processors": "2", "threads": "1", "torch": "2", "python": "3",
        "fewbits": "0",
    }  # fmt: skip
    failed = [{"method": "penalty", "k": 4, "seed": 3, "strength": 0.1, "error": "it diverged"}]
    return {
        "name": "quick", "title": "Quick & small_", "command": "fewbits study quick.toml",
        "commit": "abc", "cells": 25,
        "common": {"data": "digits", "model": "convnet", "width": 1.0},
        "axes": ["strength"], "defaults": {"strength": 1.0}, "environments": [environment],
        "rows": rows, "failed": failed,
    }  # fmt: skip


def test_entries_are_means_and_sample_deviations_over_seeds(results):
    found = {(e["label"], e["k"]): e for e in _study.entries(results, {})}
    assert len(found) == 1 + 2 + 6
    for (label, k), entry in found.items():
        if label == "float":
            assert entry["accuracy"] == statistics.mean([90, 91, 92])
            continue
        strength = float(label.rpartition("strength ")[2]) if "strength" in label else 1.0
        values = [row(entry["method"], k, seed, strength)["drop"] for seed in SEEDS]
        assert entry["drop"] == pytest.approx(statistics.mean(values))
        assert entry["drop_sd"] == pytest.approx(statistics.stdev(values))
        assert entry["best"] == (label == "penalty, strength 10")


def test_a_label_names_only_what_differs_from_the_default(results):
    labels = {e["label"] for e in _study.entries(results, {})}
    assert labels == {
        "float", "kmeans", "penalty", "penalty, strength 0.1", "penalty, strength 10"
    }  # fmt: skip


def test_networks_and_budgets_have_a_table_each(results):
    other = [r | {"model": "vgg16"} for r in results["rows"]]
    both = results | {"axes": ["strength", "model"], "rows": results["rows"] + other}
    both["defaults"] = {"strength": 1.0, "model": "convnet"}
    assert _study.tasks(both) == [{"model": "convnet"}, {"model": "vgg16"}]
    page = _study.markdown(both)
    assert "## convnet on digits" in page and "## vgg16 on digits" in page
    assert page.count("| float |") == 2
    assert "accuracy-bytes-2" in _plots.plots(both)


def test_the_page_names_command_commit_machine_and_what_failed(results):
    page = _study.markdown(results, {"a.svg": "what it shows"})
    parts = ["fewbits study quick.toml", "Commit abc.", "a processor", "24 of 25 cells"]
    parts += ["- penalty, strength 0.1, K = 4, seed 3: it diverged", "![what it shows](a.svg)"]
    for part in parts:
        assert part in page
    # The highest mean at each K, and no other, is bold.
    bold = [line for line in page.splitlines() if "**" in line]
    assert len(bold) == 2 and all("penalty, strength 10 " in line for line in bold)


def test_csv_holds_every_row(results):
    read = list(csv.DictReader(io.StringIO(_study.rows_csv(results))))
    assert len(read) == len(results["rows"])
    for found, given in zip(read, results["rows"], strict=True):
        assert float(found["drop"]) == given["drop"]
        gap = given["hardening_gap"]
        assert found["hardening_gap"] == ("" if gap is None else str(gap))
        assert "history" not in found


def test_latex_has_one_cell_per_column_and_escapes_names(results):
    results["rows"][0]["method"] = "k_means"
    text = _study.latex(results)
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({line.count(" & ") for line in lines}) == 1
    columns = text.partition(r"\begin{tabular}{")[2].partition("}")[0]
    assert len(columns) == lines[0].count(" & ") + 1
    assert r"k\_means" in text and "k_means" not in text.replace(r"k\_means", "")
    assert not set("±×–") & set(text)


def test_plots_are_readable_and_the_same_bytes_for_the_same_results(results):
    drawn = _plots.plots(results)
    assert set(drawn) == {"accuracy-bytes", "drop-k", "gap", "drop-strength"}
    for about, draw in drawn.values():
        image = draw("svg")
        assert image == draw("svg")
        text = "".join(ElementTree.fromstring(image).itertext())
        assert about in text
        assert draw("pdf").startswith(b"%PDF")
    legend = "".join(ElementTree.fromstring(drawn["gap"][1]("svg")).itertext())
    assert "penalty, strength 0.1, K = 2" in legend and "kmeans" not in legend


def test_the_folder_holds_tables_plots_and_the_results_themselves(results, tmp_path):
    write_study(tmp_path / "report", results)
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {
        "results.json",
        "report.md",
        "rows.csv",
        "table.tex",
        "drop-k.svg",
        "drop-k.pdf",
    } <= names
    page = (tmp_path / "report" / "report.md").read_text()
    for line in page.splitlines():
        if line.startswith("!["):
            assert line.partition("](")[2][:-1] in names


@pytest.mark.parametrize("many", [9, 20, 60])
def test_many_curves_are_explained_beside_the_plot(results, many):
    strengths = [1.0 + number for number in range(many)]
    rows = [row("penalty", k, s, x) for k in KS for s in SEEDS for x in strengths]
    for _, draw in _plots.plots(results | {"rows": rows}).values():
        image = ElementTree.fromstring(draw("svg"))
        _, _, width, height = map(float, image.attrib["viewBox"].split())
        plot, legend = (corners(image, name) for name in ("patch_2", "legend_1"))
        if plot[2] > legend[0]:  # few curves lie in the plot of one setting
            assert len(image.findall(f".//{SVG}g[@id='legend_1']//{SVG}text")) <= 8
        assert 0 <= legend[0] and legend[2] <= width and legend[3] <= height
        assert plot[2] - plot[0] > 250 and plot[3] - plot[1] > 200


def corners(image: ElementTree.Element, name: str) -> tuple[float, float, float, float]:
    """Return the left, upper, right and lower edge of the first path in a group."""
    path = image.find(f".//{SVG}g[@id='{name}']//{SVG}path")
    assert path is not None
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.attrib["d"])]
    return min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
