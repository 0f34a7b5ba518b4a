"""The run folder: what it takes to replace one, and that a failed write leaves what was there."""

from pathlib import Path

import pytest
import torch

from fewbits._errors import FileError
from fewbits.lab import _folder


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def make_run(folder: Path) -> None:
    _folder.create(folder, "k = [4]\n", "fewbits train --k 4")
    _folder.write_json(folder / "rows.json", [])
    _folder.write_json(folder / "jobs" / "float-seed0" / "history.json", [])
    _folder.save_state(folder / "models" / "float-seed0.safetensors", {"w": torch.ones(2)})


def test_a_config_of_another_program_does_not_make_a_folder_a_run(tmp_path: Path):
    # Many programs have a config.toml, and folders of years of work around it.
    (tmp_path / "config.toml").write_text('title = "my site"\n')
    (tmp_path / "posts").mkdir()
    (tmp_path / "posts" / "first.md").write_text("hello")
    before = written(tmp_path)
    with pytest.raises(FileError, match=r"holds no run \(no config\.toml of fewbits\)"):
        _folder.check(tmp_path, overwrite=True)
    assert written(tmp_path) == before


def test_overwriting_a_run_deletes_its_files_and_no_others(tmp_path: Path):
    make_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    _folder.check(tmp_path, overwrite=True)
    _folder.create(tmp_path, "k = [2]\n", "fewbits train --k 2")
    assert written(tmp_path) == {
        "config.toml": b"# fewbits train --k 2\nk = [2]\n",
        "notes.txt": b"mine",
    }


def test_a_folder_linked_into_a_run_is_unlinked_and_not_emptied(tmp_path: Path):
    make_run(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "run" / "models").rename(elsewhere)
    (tmp_path / "run" / "models").symlink_to(elsewhere)
    _folder.create(tmp_path / "run", "", "fewbits train")
    assert (elsewhere / "float-seed0.safetensors").exists()
    assert not (tmp_path / "run" / "models").exists()


def test_a_run_that_exists_is_refused_with_the_two_ways_on(tmp_path: Path):
    make_run(tmp_path / "run")
    with pytest.raises(FileError, match=r"exists already.*--resume .*run, or .*--overwrite"):
        _folder.check(tmp_path / "run", overwrite=False)


@pytest.mark.parametrize("state", ["absent", "empty", "killed as it began"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_with_nothing_in_it_is_taken(tmp_path: Path, state: str, overwrite: bool):
    folder = tmp_path / "run"
    if state != "absent":
        folder.mkdir()
    if state == "killed as it began":
        (folder / ".config.toml.12-34.tmp").write_text("# fewb")
    _folder.check(folder, overwrite=overwrite)
    make_run(folder)
    assert not (folder / ".config.toml.12-34.tmp").exists()


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, overwrite: bool):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FileError):
        _folder.check(tmp_path / "run", overwrite=overwrite)
    with pytest.raises(FileError, match=r"run: cannot be made \(.*Choose another --out"):
        _folder.create(tmp_path / "run", "", "fewbits train")


def test_the_command_of_a_run_is_read_back_as_one_line(tmp_path: Path):
    _folder.create(tmp_path, "k = [4]\n", "fewbits train --out 'two\nlines'")
    assert _folder.command_of(tmp_path) == "fewbits train --out 'two lines'"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "checkpoint.pt"
    _folder.save_checkpoint(path, {"history": [1]})
    before = written(tmp_path)

    class Full:
        """Pickles like a full disk."""

        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match=r"checkpoint\.pt: cannot be written \(No space left on"):
        _folder.save_checkpoint(path, {"history": Full()})
    assert written(tmp_path) == before
    assert _folder.load_checkpoint(path) == {"history": [1]}


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path):
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(FileError, match=r"float\.safetensors: cannot be written \("):
        _folder.save_state(tmp_path / "models" / "float.safetensors", {"w": torch.ones(1)})


def test_tied_weights_are_saved_under_each_name(tmp_path: Path):
    weight = torch.arange(6.0).view(2, 3)
    _folder.save_state(tmp_path / "m.safetensors", {"a": weight, "b": weight, "c": weight.T})
    state = _folder.load_state(tmp_path / "m.safetensors")
    assert torch.equal(state["a"], weight)
    assert torch.equal(state["b"], weight)
    assert torch.equal(state["c"], weight.T)


def test_what_cannot_be_read_is_named_with_the_remedy(tmp_path: Path):
    path = tmp_path / "broken"
    path.write_text("{")
    with pytest.raises(FileError, match=r"broken: is not JSON .*Delete it"):
        _folder.read_json(path)
    with pytest.raises(FileError, match=r"broken: the model cannot be read .*Delete it"):
        _folder.load_state(path)
    with pytest.raises(FileError, match=r"missing: cannot be read \(No such file"):
        _folder.read_json(tmp_path / "missing")
