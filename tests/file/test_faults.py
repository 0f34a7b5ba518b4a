"""Saves that are killed, denied or broken off against: the old file byte for byte, or the new one.

killed_saves.py does what needs processes of its own.
"""

import ast
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fewbits

PROGRAM = Path(__file__).with_name("killed_saves.py")


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the program forks")


def few(size: int = 40) -> dict[str, Tensor]:
    return {"w": torch.randint(5, (size, size)) / 4, "dense": torch.randn(size, size)}


def program(folder: Path, how: str) -> str:
    run = subprocess.run(
        [sys.executable, PROGRAM, folder, how], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@forks
def test_a_save_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path):
    found = ast.literal_eval(program(tmp_path, "moments"))
    assert found["old"] > 40  # before the renaming
    assert found["new"] > 5  # after it


@forks
def test_a_save_killed_at_any_time_leaves_the_old_file_or_the_new_one(tmp_path: Path):
    found = ast.literal_eval(program(tmp_path, "time"))
    assert found["whole"] == 25
    assert found["killed"] > 5  # the others were done before


@forks
def test_two_processes_that_save_to_one_path_leave_one_of_two_whole_files(tmp_path: Path):
    said = program(tmp_path, "together")
    assert said.endswith("} ['m.fewbits']\n")  # and nothing beside it


@forks
def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path):
    with tempfile.TemporaryDirectory() as folder:  # others cannot even enter tmp_path
        Path(folder).chmod(0o755)
        said = program(Path(folder), "stranger").splitlines()
    assert "m.fewbits: cannot be written (Permission denied)" in said[0]
    assert said[1:] == ["['m.fewbits']"]


@forks
def test_a_file_that_grows_too_large_is_refused(tmp_path: Path):
    said = program(tmp_path, "short").splitlines()
    assert "m.fewbits: cannot be written (File too large)" in said[0]
    assert said[1:] == ["['m.fewbits']"]


@pytest.mark.parametrize("kind", ["clustered", "dense", "both"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(small_disk: Path, kind: str):
    path = small_disk / "m.fewbits"
    refused = 0
    fewbits.save(few(), path)
    # In steps, so that the disk is full at different points of a save.
    for thousands in range(60, 620, 40):
        state = few()
        if kind != "dense":
            state["more"] = torch.randint(256, (thousands, 1000)).float()
        if kind != "clustered":
            state["much"] = torch.randn(thousands, 250)
        before = contents(small_disk)
        try:
            fewbits.save(state, path, coder="packed")
        except fewbits.FileError as error:
            assert "m.fewbits: cannot be written (No space left on device)" in str(error)
            assert contents(small_disk) == before
            refused += 1
        else:
            assert torch.equal(fewbits.load(path)["w"], state["w"])
        assert os.listdir(small_disk) == ["m.fewbits"]
    assert 3 < refused < 14
    fewbits.save(few(), path)  # there is room again


def test_a_read_only_file_system_is_refused(small_disk: Path):
    path = small_disk / "m.fewbits"
    fewbits.save(few(), path)
    before = contents(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(fewbits.FileError, match=r"cannot be written \(Read-only file system\)"):
        fewbits.save(few(), path)
    with pytest.raises(fewbits.FileError, match=r"cannot be written \(Read-only file system\)"):
        fewbits.save(few(), small_disk / "new" / "m.fewbits")
    assert contents(small_disk) == before


def test_a_folder_in_place_of_the_file_is_refused_and_kept(tmp_path: Path):
    path = tmp_path / "m.fewbits"
    path.mkdir()
    for name in (None, "inside"):
        if name:
            (path / name).write_text("mine")
        before = contents(tmp_path)
        with pytest.raises(fewbits.FileError, match=r"m\.fewbits: is a folder"):
            fewbits.save(few(), path)
        assert contents(tmp_path) == before
        assert os.listdir(tmp_path) == ["m.fewbits"]


def test_a_file_in_place_of_a_folder_is_refused_and_kept(tmp_path: Path):
    (tmp_path / "models").write_text("mine")
    with pytest.raises(fewbits.FileError, match=r"m\.fewbits: cannot be written"):
        fewbits.save(few(), tmp_path / "models" / "m.fewbits")
    assert contents(tmp_path) == {"models": b"mine"}


def test_missing_folders_are_made(tmp_path: Path):
    state = few()
    fewbits.save(state, tmp_path / "a" / "b" / "m.fewbits")
    assert list(contents(tmp_path)) == ["a/b/m.fewbits"]
    assert torch.equal(fewbits.load(tmp_path / "a" / "b" / "m.fewbits")["w"], state["w"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException], after: int, threads: int
):
    def failing(items, _):
        for number, item in enumerate([*items, None]):
            if number == after:
                raise error("enough")
            yield item

    path = tmp_path / "m.fewbits"
    for old in (False, True):
        if old:
            fewbits.save(few(), path)
        before = contents(tmp_path)
        with pytest.raises(fewbits.FileError if error is OSError else error, match="enough"):
            fewbits.save(few(), path, progress=failing, threads=threads)
        assert contents(tmp_path) == before


def test_a_number_too_large_for_its_type_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "m.fewbits"
    fewbits.save(few(), path)
    before = contents(tmp_path)
    late = few() | {"late": torch.tensor([1e30])}
    with pytest.raises(fewbits.FileError, match="late: 1e\\+30 is too large"):
        fewbits.save(late, path, dense_dtype=torch.float16)
    assert contents(tmp_path) == before


def test_a_link_where_the_file_is_being_written_is_not_followed(tmp_path: Path):
    (tmp_path / "mine").write_text("mine")
    writer = f"{os.getpid()}-{threading.get_ident()}"
    (tmp_path / f".m.fewbits.{writer}.tmp").symlink_to(tmp_path / "mine")
    fewbits.save(few(), tmp_path / "m.fewbits")
    assert sorted(os.listdir(tmp_path)) == ["m.fewbits", "mine"]
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("left", [0.5, 0.999])
def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path, left: float):
    path = tmp_path / "m.fewbits"

    def cutting(items, _):
        os.truncate(path, int(left * path.stat().st_size))  # after the header was read
        return items

    linear = torch.nn.Linear(200, 200)
    fewbits.quantize(linear, bits=2)
    state = linear.state_dict() | {"late": torch.randn(50_000)}
    fewbits.save(state, path)
    with pytest.raises(fewbits.FileError, match="late: ends at byte .*, beyond the file"):
        fewbits.load(path, progress=cutting, threads=1)
