"""Studies: the grid against itertools, the queue shared by processes, and what kills leave."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fewbits import FewbitsError
from fewbits.lab.study import Queue, read_study

FEWBITS = [sys.executable, "-m", "fewbits", "study"]
QUICK = "train_images = 200\nwidth = 0.25\nepochs = 1\nfinetune_epochs = 1\n"


def file_of(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def study(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FEWBITS, "grid.toml", "--quiet", *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True,
    )  # fmt: skip


# -- the grid ---------------------------------------------------------------------------------


def test_the_grid_is_the_product_of_all_lists(tmp_path):
    path = file_of(
        tmp_path,
        'methods = ["kmeans", "penalty"]\nk = [2, 3, 16]\nseeds = [4, 5]\nstrength = [0.1, 1]\n',
    )
    cells = read_study(path).cells
    found = {(c.method, c.k, c.seed, c.config.strength) for c in cells}
    assert found == set(itertools.product(("kmeans", "penalty"), (2, 3, 16), (4, 5), (0.1, 1.0)))
    assert len(cells) == len({cell.key for cell in cells}) == 24
    assert [cell.seed for cell in cells] == [4] * 12 + [5] * 12  # the whole grid for a seed first


def test_grids_add_to_the_common_settings_and_a_cell_that_two_name_is_there_once(tmp_path):
    path = file_of(
        tmp_path,
        'epochs = 3\nk = 2\n[[grid]]\nmethods = ["kmeans", "penalty"]\n'
        '[[grid]]\nmethods = "penalty"\nk = [2, 4]\nepochs = [3, 5]\n',
    )
    found = [(c.method, c.k, c.config.epochs) for c in read_study(path).cells]
    assert sorted(found) == [
        ("kmeans", 2, 3), ("penalty", 2, 3), ("penalty", 2, 5), ("penalty", 4, 3),
        ("penalty", 4, 5),
    ]  # fmt: skip


def test_a_key_depends_on_every_setting_and_not_on_their_order(tmp_path):
    one = read_study(file_of(tmp_path, "k = 2\nlr = 0.1\nexclude = ['a', 'b']\n")).cells
    same = read_study(file_of(tmp_path, "exclude = ['a', 'b']\nlr = 0.1\nk = [2]\n")).cells
    other = read_study(file_of(tmp_path, "k = 2\nlr = 0.1\nexclude = ['a']\n")).cells
    assert [c.key for c in one] == [c.key for c in same]
    assert not {c.key for c in one} & {c.key for c in other}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochz = 3\n", "Did you mean 'epochs'"),
        ("title = 3\n", "Give a text"),
        ("grid = 3\n", "write [[grid]]"),
        ("k = [2, 'a']\n", "Give a whole number"),
        ("k = [2, 0]\n", "k is 0"),
        ("methods = 'kmean'\n", "Did you mean 'kmeans'"),
        ("k = \n", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_remedy(tmp_path, text, said):
    with pytest.raises(FewbitsError) as error:
        read_study(file_of(tmp_path, text))
    assert said in str(error.value)


# -- the queue --------------------------------------------------------------------------------


@pytest.fixture
def cells(tmp_path):
    found = read_study(file_of(tmp_path, "k = [2, 4, 8]\n")).cells
    assert len(found) == 6
    return {cell.key: cell for cell in found}


def drain(queue: Queue, cells, seen: list) -> None:
    def do(cell):
        seen.append(cell.key)
        return 50.0, {"row": cell.k}

    while queue.do_next(cells, do):
        pass


def test_each_cell_is_done_once_however_often_the_queue_is_filled(tmp_path, cells):
    one, two = Queue(tmp_path, "grid"), Queue(tmp_path, "grid")
    seen: list[str] = []
    one.fill(cells.values())
    two.fill(cells.values())
    drain(one, cells, seen)
    two.fill(cells.values())
    drain(two, cells, seen)
    assert seen == list(cells)
    assert two.done() == {key: {"row": cell.k} for key, cell in cells.items()}
    one.close()
    two.close()


def test_cells_that_two_processes_enqueued_at_once_are_done_once(tmp_path, cells):
    one, two = Queue(tmp_path, "grid"), Queue(tmp_path, "grid")
    # Both look before either has enqueued anything.
    nothing = two._trials
    two._trials = lambda *states: []
    one.fill(cells.values())
    two.fill(cells.values())
    two._trials = nothing
    seen: list[str] = []

    def interrupted(cell):
        drain(two, cells, seen)  # the cell's twin is passed over, since the cell runs
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.do_next(cells, interrupted)
    assert len(seen) == len(cells) - 1
    assert two.fill(cells.values()) == 1
    drain(two, cells, seen)
    assert sorted(seen) == sorted(cells)
    one.close()
    two.close()


def test_a_failed_cell_stops_nothing_and_waits_again_only_when_asked(tmp_path, cells):
    queue = Queue(tmp_path, "grid")
    bad = next(iter(cells))

    def do(cell):
        if cell.key == bad:
            raise ValueError("two\nlines")
        return 50.0, {}

    queue.fill(cells.values())
    while queue.do_next(cells, do):
        pass
    assert queue.failed() == {bad: "ValueError: two lines"}
    assert set(queue.done()) == set(cells) - {bad}
    queue.fill(cells.values())
    assert not queue.do_next(cells, do)
    queue.fill(cells.values(), retry=True)
    seen: list[str] = []
    drain(queue, cells, seen)
    assert seen == [bad]
    assert queue.failed() == {}
    queue.close()


def test_an_interrupted_cell_waits_again(tmp_path, cells):
    queue = Queue(tmp_path, "grid")
    queue.fill(cells.values())

    def stop(cell):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queue.do_next(cells, stop)
    assert queue.failed() == {}
    queue.fill(cells.values())
    seen: list[str] = []
    drain(queue, cells, seen)
    assert sorted(seen) == sorted(cells)
    queue.close()


def test_a_cell_waits_again_whose_process_was_killed_while_it_took_it(tmp_path, cells):
    queue = Queue(tmp_path, "grid")
    queue.fill(cells.values())
    with pytest.warns(UserWarning, match="Heartbeat"):
        queue._study.ask()  # all that such a process leaves: a cell that runs, in nobody's name
    seen: list[str] = []
    drain(queue, cells, seen)
    assert len(seen) == len(cells) - 1
    assert queue.fill(cells.values()) == 1
    drain(queue, cells, seen)
    assert sorted(seen) == sorted(cells)
    queue.close()


def test_cells_of_a_changed_file_that_are_gone_from_it_are_passed_over(tmp_path, cells):
    queue = Queue(tmp_path, "grid")
    queue.fill(cells.values())
    fewer = dict(list(cells.items())[2:])
    seen: list[str] = []
    drain(queue, fewer, seen)
    assert seen == list(fewer)
    queue.close()


def test_a_storage_that_cannot_be_opened_is_refused_by_name(tmp_path):
    with pytest.raises(FewbitsError, match="nosuchthing://x: the storage cannot be opened"):
        Queue(tmp_path, "grid", "nosuchthing://x")


# -- whole studies ----------------------------------------------------------------------------

GRID = (
    f'title = "A quick one"\n{QUICK}seeds = [0, 1]\n'
    '[[grid]]\nmethods = ["kmeans", "penalty"]\nk = [2, 4]\n'
    '[[grid]]\nmethods = "penalty"\nk = 2\nstrength = [0.1, 10]\n'
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study: its folder and the results it printed."""
    folder = tmp_path_factory.mktemp("study")
    file_of(folder, GRID)
    result = study(folder, "--json")
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


def rows_of(results: dict) -> list[dict]:
    """What may not differ between two ways to the same results."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in results["rows"]]


def test_results_hold_a_row_per_cell_with_its_axes(finished):
    _, results = finished
    assert results["title"] == "A quick one"
    assert results["axes"] == ["strength"]
    assert results["common"]["train_images"] == 200
    found = {(r["method"], r["k"], r["strength"], r["seed"]) for r in results["rows"]}
    assert len(found) == len(results["rows"]) == results["cells"] == 12
    assert ("penalty", 2, 0.1, 1) in found
    for row in results["rows"]:
        assert row["drop"] == pytest.approx(row["float_accuracy"] - row["accuracy"], abs=2e-4)
        assert len(row["history"]) == (row["method"] == "penalty")


def test_float_networks_are_trained_once_for_all_cells(finished):
    folder, results = finished
    jobs = sorted(p.parent.name for p in folder.glob("runs/grid/float/*/jobs/*/result.json"))
    assert jobs == ["float-continued-seed0", "float-continued-seed1", "float-seed0", "float-seed1"]
    assert len({(r["seed"], r["float_accuracy"]) for r in results["rows"]}) == 2


def test_a_finished_study_does_nothing_when_run_again_but_sweep(finished):
    folder, results = finished
    left = [folder / f"runs/grid/{name}.123-456.tmp" for name in (".study.toml", "report/.gap.svg")]
    for path in left:  # what a kill leaves half-written
        path.write_text("half")
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/grid/cells/**/*")}
    again = study(folder, "--json")
    assert json.loads(again.stdout)["rows"] == results["rows"]
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("runs/grid/cells/**/*")}
    assert not any(path.exists() for path in left)


def test_the_report_is_made_of_what_is_done_without_training(finished, tmp_path):
    folder, results = finished
    file_of(tmp_path, GRID.replace("k = [2, 4]", "k = [2, 4, 8]"))
    asked = study(tmp_path, "--report", "--json", "--out", str(folder / "runs" / "grid"))
    assert asked.returncode == 0, asked.stderr
    found = json.loads(asked.stdout)
    assert found["cells"] == 16
    assert rows_of(found) == rows_of(results)


def test_a_cell_that_fails_is_reported_and_the_others_are_done(tmp_path):
    path = file_of(tmp_path, QUICK + 'k = [2, 4]\nmethods = "penalty"\n')
    bad = read_study(path).cells[0]
    damaged = tmp_path / f"runs/grid/cells/{bad.name}/jobs/penalty-k2-seed0/checkpoint.pt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"no checkpoint")
    (tmp_path / "runs/grid/study.toml").write_text("")
    result = study(tmp_path)
    assert result.returncode == 1
    assert "1 of 2 cells failed" in result.stderr
    assert "the checkpoint is damaged" in result.stderr
    assert "Traceback" not in result.stderr
    kept = json.loads((tmp_path / "runs/grid/report/results.json").read_text())
    assert [row["k"] for row in kept["rows"]] == [4]
    assert [row["k"] for row in kept["failed"]] == [2]
    damaged.unlink()
    again = study(tmp_path, "--retry", "--json")
    assert again.returncode == 0, again.stderr
    assert [row["k"] for row in json.loads(again.stdout)["rows"]] == [2, 4]


def test_processes_share_the_cells_and_one_that_is_killed_loses_nothing(finished, tmp_path):
    _, results = finished
    file_of(tmp_path, GRID)
    one, two, three = (
        subprocess.Popen(
            [*FEWBITS, "grid.toml", "--quiet"], cwd=tmp_path, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    )  # fmt: skip
    assert three.stderr is not None
    first = three.stderr.readline()  # it has done a cell, and is at the next
    three.send_signal(signal.SIGKILL)
    said = [one.communicate()[1], two.communicate()[1]]
    killed = first + three.communicate()[1]  # maybe it got further before the signal came
    assert [one.returncode, two.returncode] == [0, 0], said
    by_one, by_two, by_three = (
        {line.partition("] ")[2].partition(":")[0] for line in text.splitlines() if "] " in line}
        for text in (*said, killed)
    )
    assert by_one and by_two and not by_one & by_two, said
    assert len(by_one | by_two | by_three) == 12, (killed, said)
    last = json.loads(study(tmp_path, "--report", "--json").stdout)
    assert rows_of(last) == rows_of(results)


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    file_of(tmp_path, QUICK)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    result = study(tmp_path, "--out", "mine")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "holds no study" in result.stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_a_cell_that_cannot_be_planned_is_refused_before_any_training(tmp_path):
    file_of(tmp_path, QUICK + "exclude = ['nothing-like-this']\n")
    result = study(tmp_path)
    assert result.returncode == 1
    assert "nothing-like-this" in result.stderr
    assert not list(tmp_path.glob("runs/grid/cells/*"))
