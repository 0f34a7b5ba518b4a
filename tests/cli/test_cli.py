"""The command line end to end on digits: what it prints, what it writes, how it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FEWBITS = [sys.executable, "-m", "fewbits"]
QUICK = ["--train-images", "200", "--width", "0.25", "--epochs", "1", "--finetune-epochs", "1"]
# What the guide promises for --json, in this order.
KEYS = (
    "method k seed float_accuracy accuracy drop hardening_gap bits_fixed bits_entropy bytes ratio"
    " file_bytes seconds"
).split()


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def fewbits(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FEWBITS, *arguments], cwd=folder, env=environment(), capture_output=True, text=True
    )


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A finished comparison: its run folder and the rows it printed."""
    folder = tmp_path_factory.mktemp("finished")
    result = fewbits(
        folder, "compare", *QUICK, "--methods", "kmeans,penalty", "--k", "2,3", "--seed", "0-1",
        "--json", "--quiet", "--out", "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder / "run", json.loads(result.stdout)


def test_json_holds_a_row_per_method_k_and_seed_with_exactly_the_promised_keys(finished):
    run, rows = finished
    assert [list(row) for row in rows] == [KEYS] * 8
    found = {(row["method"], row["k"], row["seed"]) for row in rows}
    assert found == {(m, k, s) for m in ("kmeans", "penalty") for k in (2, 3) for s in (0, 1)}
    assert json.loads((run / "rows.json").read_text()) == rows


def test_the_numbers_of_a_row_agree_with_each_other(finished):
    _, rows = finished
    for row in rows:
        # rounded to four decimals each
        assert row["drop"] == pytest.approx(row["float_accuracy"] - row["accuracy"], abs=2e-4)
        assert row["bits_fixed"] == {2: 1.0, 3: 2.0}[row["k"]]
        assert 0 < row["bits_entropy"] <= row["bits_fixed"]
        assert (row["hardening_gap"] is None) == (row["method"] == "kmeans")
        assert row["ratio"] > 1


def test_the_run_folder_holds_config_metrics_models_and_report(finished):
    run, _ = finished
    names = set(written(run))
    assert {"config.toml", "metrics.jsonl", "rows.json", "details.json", "report.html"} <= names
    for seed in (0, 1):
        for name in ("float", "float-continued", "kmeans-k3", "penalty-k3"):
            assert f"models/{name}-seed{seed}.safetensors" in names
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gaps = {e["job"]: e["hardening_gap"] for e in epochs}
    assert gaps["float-seed0"] is None
    assert isinstance(gaps["penalty-k2-seed1"], float)


def test_tensorboard_shows_the_same_metrics(finished):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, _ = finished
    history = json.loads((run / "jobs" / "penalty-k3-seed0" / "history.json").read_text())
    events = accumulator.EventAccumulator(str(run / "tensorboard" / "penalty-k3-seed0"))
    events.Reload()
    for name in ("loss", "penalty", "accuracy", "hardening_gap"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        # TensorBoard keeps float32
        assert shown == [(e["epoch"], pytest.approx(e[name], rel=1e-6)) for e in history]


def test_the_saved_models_hold_as_few_values_as_the_row_says(finished):
    from safetensors.torch import load_file

    run, _ = finished
    state = load_file(run / "models" / "penalty-k3-seed0.safetensors")
    weights = {name: t for name, t in state.items() if t.dim() >= 2}
    assert len(weights) == 7  # six convolutions and a linear layer
    assert all(len(weight.unique()) <= 3 for weight in weights.values())
    assert not [name for name in state if "codebook" in name]


def test_the_saved_config_gives_the_same_rows_again(finished, tmp_path):
    run, rows = finished
    again = fewbits(tmp_path, "compare", "--config", str(run / "config.toml"), "--json", "--quiet")
    assert again.returncode == 0, again.stderr
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    repeated = json.loads(again.stdout)
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in repeated] == timeless
    (folder,) = (tmp_path / "runs").iterdir()  # named after data, model and time

    def settings(text: str) -> str:
        return text.partition("\n")[2]  # the first line is the command

    saved = [(f / "config.toml").read_text() for f in (run, folder)]
    assert settings(saved[0]) == settings(saved[1])


def test_train_compares_a_method_with_quantizing_after_training(tmp_path):
    (tmp_path / "config.toml").write_text('k = 5\nexclude = ["0"]\nwidth = 0.125\nepochs = 9\n')
    result = fewbits(
        tmp_path, "train", "--config", "config.toml", "--method", "proximal", *QUICK, "--out", "r"
    )
    assert result.returncode == 0, result.stderr
    assert "kmeans" in result.stdout and "proximal" in result.stdout
    assert result.stdout.splitlines()[-1] == "report: r/report.html"
    config = (tmp_path / "r" / "config.toml").read_text()
    assert "epochs = 1\n" in config and "width = 0.25\n" in config  # flags override the file
    assert 'exclude = ["0"]\n' in config and "k = [5]\n" in config
    details = json.loads((tmp_path / "r" / "details.json").read_text())
    names = {layer["name"] for layer in details["layers"]}
    assert "0.weight" not in names and "3.weight" in names
    assert "proximal-k5-seed0" in result.stderr  # the progress bars


def test_quiet_prints_no_bars(tmp_path):
    result = fewbits(tmp_path, "train", *QUICK, "--method", "kmeans", "--quiet")
    assert result.returncode == 0
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "--bits", "2", "--k", "4"], 1, "both are given"),
        (["train", "--bits", "17"], 1, "from 0 to 16"),
        (["train", "--k", "0"], 1, "k is 0"),
        (["train", "--method", "kmean"], 1, "Did you mean 'kmeans'"),
        (["train", "--regularizer", "nearest"], 1, "Did you mean 'nearest-"),
        (["train", "--model", "convnt"], 1, "Did you mean 'convnet'"),
        (["train", "--data", "nowhere"], 1, "nowhere"),
        (["train", "--exclude", "features.*"], 1, "features.*"),
        (["train", "--epochs", "0"], 1, "epochs is 0"),
        (["train", "--config", "missing.toml"], 1, "missing.toml"),
        (["train", "--resume", "nowhere"], 1, "nowhere"),
        (["train", "--k", "two"], 2, "two"),
        (["train", "--epocs", "3"], 2, "--epochs"),
        (["trian"], 2, "train"),
    ],
)
def test_a_refusal_is_clear_and_writes_nothing(tmp_path, arguments, code, words):
    result = fewbits(tmp_path, *arguments)
    assert result.returncode == code, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if code == 1:
        assert len(result.stderr.splitlines()) == 1
    assert written(tmp_path) == {}


def test_a_config_key_that_does_not_exist_is_named_with_the_nearest(tmp_path):
    (tmp_path / "c.toml").write_text("epoch = 3\n")
    result = fewbits(tmp_path, "train", "--config", "c.toml")
    assert result.returncode == 1
    assert "no setting 'epoch'. Did you mean 'epochs'" in result.stderr


def test_an_existing_run_is_not_touched_unless_asked(finished):
    run, _ = finished
    before = written(run)
    refused = fewbits(run.parent, "train", *QUICK, "--out", "run")
    assert refused.returncode == 1
    assert "--overwrite" in refused.stderr and "--resume" in refused.stderr
    # What cannot be done does not cost the earlier run either.
    impossible = fewbits(run.parent, "train", "--model", "no", "--out", "run", "--overwrite")
    assert impossible.returncode == 1
    assert written(run) == before


def test_a_folder_that_holds_no_run_is_never_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.txt").write_text("dear")
    result = fewbits(tmp_path, "train", *QUICK, "--out", "photos", "--overwrite")
    assert result.returncode == 1
    assert "holds no run" in result.stderr
    assert written(tmp_path) == {"photos/dear.txt": b"dear"}


def test_overwrite_replaces_a_run(tmp_path):
    for k in ("2", "4"):
        arguments = ["train", *QUICK, "--method", "kmeans", "--k", k, "--out", "run", "--overwrite"]
        assert fewbits(tmp_path, *arguments, "--quiet").returncode == 0
    assert "models/kmeans-k2-seed0.safetensors" not in written(tmp_path / "run")
    assert "models/kmeans-k4-seed0.safetensors" in written(tmp_path / "run")


def test_ctrl_c_keeps_the_last_checkpoint_and_the_command_it_names_goes_on(tmp_path):
    arguments = ["train", *QUICK[:4], "--epochs", "100", "--out", "run", "--quiet"]
    child = subprocess.Popen(
        [*FEWBITS, *arguments], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True,
        # Tests that run in a shell's background inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    checkpoint = tmp_path / "run" / "jobs" / "float-seed0" / "checkpoint.pt"
    while not checkpoint.exists() and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, message = child.communicate(timeout=60)
    assert child.returncode == 130
    assert message == "fewbits: stopped. Go on with: fewbits compare --resume run\n"
    assert checkpoint.exists()
    resumed = fewbits(tmp_path, *message.split("fewbits ")[-1].split(), "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    epochs = [json.loads(line) for line in lines]
    assert [e["epoch"] for e in epochs if e["job"] == "float-seed0"] == list(range(1, 101))


def test_help_names_every_method_and_regularizer(tmp_path):
    from fewbits.lab.methods import METHODS, REGULARIZERS

    text = fewbits(tmp_path, "compare", "--help").stdout
    for name in (*METHODS, *REGULARIZERS):
        assert name in text


def test_bench_measures_every_variant_and_size(tmp_path):
    sizes = ["--batch", "2", "--weights", "3000", "--pairs", "2", "--k", "2,3"]
    result = fewbits(tmp_path, "bench", "--model", "convnet", *sizes, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["threads"] == 1 and not written(tmp_path)
    assert len(found["steps"]) == len(found["layers"]) == 3 * 2 and len(found["attaching"]) == 2
    assert found["passes"].pop(0)["what"] == "copying"
    assert len(found["passes"]) == (3 if found["compiled"] else 2) * 2
    assert len(found["snapped"]) == 2 * 2
    for row in found["passes"] + found["snapped"] + found["steps"] + found["layers"]:
        assert 0 < row["low"] <= row["ratio"] <= row["high"] and row["k"] in (2, 3)
    as_text = fewbits(tmp_path, "bench", "--model", "convnet", *sizes).stdout
    assert as_text.count("| penalty, convnet, batch 2 |") == 2


def test_bench_measures_only_what_is_asked_for(tmp_path):
    sizes = ["--batch", "2", "--weights", "3000", "--pairs", "2", "--k", "2"]
    narrow = ["--tables", "attaching,steps", "--width", "0.5", "--json"]
    result = fewbits(tmp_path, "bench", "--model", "convnet", *sizes, *narrow)
    found = json.loads(result.stdout)
    assert {"attaching", "steps"} == {n for n, rows in found.items() if isinstance(rows, list)}
    assert found["steps"][0]["what"] == "penalty, convnet at width 0.5, batch 2"


def test_bench_refuses_what_it_cannot_measure(tmp_path):
    result = fewbits(tmp_path, "bench", "--pairs", "1")
    assert result.returncode == 1 and "--pairs from 2" in result.stderr
    result = fewbits(tmp_path, "bench", "--tables", "attaching,pases")
    assert result.returncode == 1 and "--tables has 'pases'" in result.stderr
