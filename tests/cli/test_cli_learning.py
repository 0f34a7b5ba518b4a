"""What a newcomer and another program rely on: help, examples, completion, one-line errors."""

import json
import re
import shlex

import click
import pytest

from fewbits._cli import cli, run

COMMANDS = sorted(cli.commands)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = 0
    try:
        run(list(arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def examples(text: str) -> list[list[str]]:
    """The words of every line of a help that is a command."""
    lines = re.findall(r"^ +(?:\w+=\S+ )?fewbits ([^|#\n]*)", text, re.MULTILINE)
    return [shlex.split(re.split(r" {3,}|>", line)[0]) for line in lines]


def test_help_begins_with_first_steps_and_lists_every_command(capsys):
    code, out, _ = said(capsys, "--help")
    assert code == 0
    listed = re.findall(r"^  ([a-z]+) ", out.partition("Commands:")[2], re.MULTILINE)
    assert sorted(listed) == COMMANDS
    assert listed[0] == "train"
    assert out.index("First steps") < out.index("Options")
    assert "..." not in out.partition("Commands:")[2]  # no sentence is cut


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_whose_options_exist(name, capsys):
    _, out, _ = said(capsys, name, "--help")
    found = [words for words in examples(out) if words and words[0] == name]
    assert found
    for words in found:
        assert {w for w in words if w.startswith("-")} <= set(re.findall(r"-[\w-]+", out))


def test_every_command_has_json_and_debug():
    for name in COMMANDS:
        options = {o for p in cli.commands[name].params for o in p.opts}
        assert {"--json", "--debug"} <= options, name  # another program reads the JSON


@pytest.mark.parametrize("arguments", [
    ("trian",), ("train", "--epocs", "3"), ("quantize",), ("export", "m", "--to", "onx", "-o", "x"),
    ("train", "--bits", "two"), ("inspect", "a", "b"),
])  # fmt: skip
def test_a_usage_error_is_one_line_that_names_the_help(arguments, capsys):
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("fewbits: ")
    assert "--help` lists what there is." in err


def test_what_the_machine_refuses_is_one_line_and_exit_code_1(capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "there")

    def bug(*_, **__):
        raise RuntimeError("surprise")

    for raised, code, words in ((full, 1, "there: No space left"), (bug, 70, "internal error")):
        monkeypatch.setattr(cli.commands["inspect"], "callback", raised)
        found, out, err = said(capsys, "inspect", "m.fewbits")
        assert (found, out) == (code, "")
        assert err.count("\n") == 1 and words in err


def test_json_of_quantize_and_unpack_tells_the_sizes(tmp_path, capsys):
    import torch
    from safetensors.torch import save_file

    dense, small, back = (tmp_path / name for name in ("d.safetensors", "s.fewbits", "b.st"))
    save_file({"w": torch.randn(40, 50)}, dense)
    arguments = ["--json", "--quiet"]
    _, out, _ = said(capsys, "quantize", str(dense), "-o", str(small), "--bits", "2", *arguments)
    sizes = {"source": dense, "target": small}
    for key, path in sizes.items():
        assert json.loads(out)[key] == {"path": str(path), "bytes": path.stat().st_size}
    _, out, _ = said(capsys, "unpack", str(small), "-o", str(back), *arguments)
    assert json.loads(out)["target"]["bytes"] == back.stat().st_size


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_is_told_how_to_complete(shell, capsys, monkeypatch):
    monkeypatch.setenv("_FEWBITS_COMPLETE", f"{shell}_source")
    code, out, _ = said(capsys)
    assert code == 0
    assert "_FEWBITS_COMPLETE" in out and "fewbits" in out


def test_options_are_completed(capsys, monkeypatch):
    monkeypatch.setenv("_FEWBITS_COMPLETE", "zsh_complete")
    monkeypatch.setenv("COMP_WORDS", "fewbits quantize --gran")
    monkeypatch.setenv("COMP_CWORD", "2")
    _, out, _ = said(capsys)
    assert "--granularity" in out


def test_nothing_printed_is_colored():
    context = click.Context(cli)
    assert not any("\x1b" in command.get_help(context) for command in cli.commands.values())
