"""The commands on files end to end: what they print, what they write, how they refuse."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import fewbits


def run(folder, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fewbits", *arguments], cwd=folder, capture_output=True, text=True
    )


@pytest.fixture
def folder(tmp_path):
    state = {"fc.weight": torch.randn(60, 50), "fc.bias": torch.randn(60)}
    safetensors.torch.save_file(state, tmp_path / "dense.safetensors")
    return tmp_path


def test_quantize_inspect_unpack_and_diff_work_on_each_others_files(folder):
    done = run(folder, "quantize", "dense.safetensors", "-o", "m.fewbits", "--bits", "4")
    assert done.returncode == 0, done.stderr
    size = (folder / "m.fewbits").stat().st_size
    assert f"m.fewbits: {size:,} bytes" in done.stdout
    assert "quantizing: 100%" in done.stderr

    listed = run(folder, "inspect", "m.fewbits").stdout.splitlines()
    assert listed[0].split() == "tensor shape type coder k fixed file bytes share".split()
    rows = {line.split()[0]: line.split() for line in listed[1:3]}
    assert rows["fc.weight"][1:3] + rows["fc.weight"][4:6] == ["60x50", "float32", "16", "4"]
    assert rows["fc.bias"][3] == "dense"

    assert run(folder, "unpack", "m.fewbits", "-o", "u.safetensors").returncode == 0
    same = run(folder, "diff", "m.fewbits", "u.safetensors", "--quiet")
    assert (same.returncode, same.stderr) == (0, "")
    assert same.stdout.splitlines()[-1] == "2 of 2 tensors are equal"
    other = run(folder, "diff", "dense.safetensors", "m.fewbits")
    assert other.stdout.splitlines()[-1] == "1 of 2 tensors are equal"


def test_json_is_json_and_its_bytes_add_up(folder):
    run(folder, "quantize", "dense.safetensors", "-o", "m.fewbits", "--k", "3", "--quiet")
    found = json.loads(run(folder, "inspect", "m.fewbits", "--json").stdout)
    assert found["bytes"] == (folder / "m.fewbits").stat().st_size
    by_name = {row["name"]: row for row in found["tensors"]}
    assert by_name["fc.weight"]["k"] == 3 and by_name["fc.bias"]["k"] is None
    assert sum(row["bytes"] for row in found["tensors"]) < found["bytes"]
    rows = json.loads(run(folder, "diff", "dense.safetensors", "m.fewbits", "--json").stdout)
    assert {row["name"]: row["status"] for row in rows} == {
        "fc.weight": "differs", "fc.bias": "equal",
    }  # fmt: skip


def test_channels_methods_exclusions_and_coders_reach_the_file(folder):
    done = run(
        folder, "quantize", "dense.safetensors", "-o", "m.fewbits", "--k", "2", "--granularity",
        "channel", "--method", "uniform", "--coder", "packed",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    weight = fewbits.load(folder / "m.fewbits")["fc.weight"]
    dense = safetensors.torch.load_file(folder / "dense.safetensors")["fc.weight"]
    assert torch.equal(weight.amin(1), dense.amin(1))
    assert all(len(row.unique()) == 2 for row in weight)
    done = run(folder, "quantize", "dense.safetensors", "-o", "n", "--k", "2", "--exclude", "fc*")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no weight has few values" in done.stderr


@pytest.mark.parametrize(("arguments", "said"), [
    (("quantize", "dense.safetensors", "-o", "m"), "one of --bits and --k"),
    (("quantize", "dense.safetensors", "-o", "m", "--bits", "2", "--k", "4"), "one of --bits"),
    (("quantize", "dense.safetensors", "-o", "m", "--k", "0"), "k is 0"),
    (("quantize", "missing", "-o", "m", "--k", "2"), "missing: cannot be read"),
    (("quantize", "dense.safetensors", "-o", "dense.safetensors", "--k", "2"), "exists already"),
    (("inspect", "missing"), "missing: cannot be read"),
    (("inspect", "."), "cannot be read"),
    (("unpack", "junk", "-o", "m"), "junk: is no fewbits or safetensors file"),
    (("diff", "dense.safetensors", "junk"), "junk: is no fewbits or safetensors file"),
])  # fmt: skip
def test_a_refusal_is_one_line_and_exit_code_1(folder, arguments, said):
    (folder / "junk").write_bytes(b"junk" * 9)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = run(folder, *arguments, *(() if arguments[0] == "inspect" else ("--quiet",)))
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_names_from_a_file_cannot_steer_the_terminal(folder):
    fewbits.save({"w": torch.zeros(9, 9), "\x1b[31m\n": torch.ones(2)}, folder / "m.fewbits")
    shown = run(folder, "inspect", "m.fewbits").stdout
    assert "\x1b" not in shown
    assert r"\x1b[31m\n" in shown
