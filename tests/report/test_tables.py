"""The aggregated rows, against the statistics module and worked examples."""

import random
import re
import statistics

import pytest
from fake_run import fake_row

from fewbits.report import comparison, markdown, text


def test_deviation_is_the_sample_one_and_absent_for_one_seed() -> None:
    rng = random.Random(1)
    rows = [fake_row(rng, "penalty", 4, seed) for seed in range(5)]
    [entry] = comparison(rows)
    for key in ("accuracy", "drop", "hardening_gap", "bits_entropy", "seconds"):
        values = [r[key] for r in rows]
        # Both are float64 sums of five terms.
        assert entry[key] == pytest.approx(statistics.fmean(values), rel=1e-12)
        assert entry[f"{key}_sd"] == pytest.approx(statistics.stdev(values), rel=1e-9)
    assert comparison(rows[:1])[0]["accuracy_sd"] is None


def test_null_gap_is_left_out_of_its_mean_only() -> None:
    rng = random.Random(1)
    rows = [fake_row(rng, "penalty", 4, seed) for seed in range(3)]
    rows[1]["hardening_gap"] = None
    [entry] = comparison(rows)
    assert entry["n"] == 3
    assert entry["hardening_gap"] == statistics.mean(rows[i]["hardening_gap"] for i in (0, 2))
    assert comparison([fake_row(rng, "kmeans", 4, 0)])[0]["hardening_gap"] is None


def test_entries_keep_first_seen_order_and_mark_the_best_of_each_k() -> None:
    rng = random.Random(1)
    rows = [fake_row(rng, m, k, 0) for m, k in [("b", 4), ("a", 4), ("b", 2), ("b", 4), ("a", 8)]]
    for row, accuracy in zip(rows, [90, 95, 80, 91, 99], strict=True):
        row["accuracy"] = accuracy
    entries = comparison(rows)
    assert [(e["method"], e["k"]) for e in entries] == [("b", 4), ("a", 4), ("b", 2), ("a", 8)]
    assert [e["best"] for e in entries] == [False, True, False, False]  # alone at k: no mark


def test_text_is_aligned_and_markdown_has_equal_cells() -> None:
    rng = random.Random(3)
    names = ("penalty", "a-rather-long-name")
    rows = [fake_row(rng, m, k, s) for m in names for k in (4, 256) for s in range(2)]
    *lines, legend = text(rows).splitlines()
    assert legend.startswith("*")
    assert len({len(line) for line in lines}) == 1
    # Cells part at two spaces; all but the first are flush right below their head.
    cells = [list(re.finditer(r"\S+(?: \S+)*(?=  |$)", line)) for line in lines]
    ends = [[c.end() for c in line[1:] if c.group() != "*"] for line in cells]
    assert ends == [ends[0]] * len(lines)
    assert {line[0].start() for line in cells} == {0}
    assert "hardening" not in text(rows) and " gap " in lines[0]
    assert {line.count(" | ") for line in markdown(rows).splitlines()} == {10}
    post_training = [fake_row(rng, "kmeans", 4, 0)]
    assert " gap " not in text(post_training) and "*" not in text(post_training)


def test_markdown_escapes_a_bar_in_a_name() -> None:
    row = fake_row(random.Random(1), "a|b", 4, 0)
    assert "| a\\|b |" in markdown([row])
