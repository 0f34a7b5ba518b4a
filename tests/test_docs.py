"""The pages against the code: blocks run, links lead somewhere, names and equations exist."""

import dataclasses
import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest

from fewbits.__main__ import main
from fewbits.lab.compare import ROW_KEYS
from fewbits.lab.config import Config, read_toml
from fewbits.lab.methods import METHODS, REGULARIZERS
from fewbits.lab.study import read_study
from fewbits.report import study_page

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# Pages that promise an example.
WITH_EXAMPLES = ("README.md", "docs/guide.md", "docs/method.md")
GUIDE = ROOT / "docs/guide.md"
METHOD = ROOT / "docs/method.md"
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py"), *PAGES])

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(path, language):
    """(line of the opening fence, text) of every fenced block of a language."""
    text = path.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start()) + 1, match[1]) for match in found]


def prose(path):
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def cited_equations(text):
    """The numbers in "eq. 7", "eqs. 9 and 10", "eqs. 1 to 3"."""
    numbers = set()
    for cited in re.findall(r"\beqs?\.\s+(\d+(?:(?:,| and| to)\s+\d+)*)", text):
        ends = [int(n) for n in re.findall(r"\d+", cited)]
        numbers |= set(range(ends[0], ends[-1] + 1)) if " to " in cited else set(ends)
    return numbers


# Advice of the packages whose loops the examples use, such as to have more workers.
@pytest.mark.filterwarnings(
    "ignore:::lightning", "ignore:::torch.utils.data", "ignore:torch.distributed is"
)
@page
def test_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    name = f"page_{page.stem}"  # a page may be called as a package is
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    monkeypatch.chdir(tmp_path)
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(page), "exec"), vars(module))


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_page_has_an_example(name):
    assert blocks(ROOT / name, "python")


@page
def test_relative_links_lead_somewhere(page):
    found = re.findall(r"\]\(([^)\s]+)\)|\b(?:src|href)=\"([^\"]+)\"", prose(page))
    for link in (a or b for a, b in found):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_equations_and_sections_cited_exist(path):
    text = path.read_text()
    missing = {
        name for name in re.findall(r"\bdocs/[\w/.-]+\.md\b", text) if not (ROOT / name).exists()
    }
    assert not missing
    method = METHOD.read_text()
    assert cited_equations(text) <= {int(n) for n in re.findall(r"\\tag\{(\d+)\}", method)}
    sections = set(re.findall(r"^## (\d+)\.", method, re.MULTILINE))
    assert set(re.findall(r"docs/method\.md, section (\d+)", text)) <= sections


def test_equations_are_named_and_numbered_in_order():
    method = METHOD.read_text()
    named = re.findall(r"\*\*Eq\. (\d+),", method)
    assert named == re.findall(r"\\tag\{(\d+)\}", method)
    assert named == [str(n + 1) for n in range(len(named))]


@pytest.fixture
def helps(monkeypatch, capsys):
    """The words of `fewbits COMMAND --help`, by command."""

    def read(*arguments):
        monkeypatch.setattr(sys, "argv", ["fewbits", *arguments, "--help"])
        main()
        return capsys.readouterr().out

    commands = re.findall(r"^  ([a-z]+) ", read().partition("Commands:")[2], re.MULTILINE)
    return {name: set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", read(name))) for name in commands}


@page
def test_commands_and_options_named_exist(page, helps):
    for _, block in blocks(page, "sh"):
        for command, rest in re.findall(
            r"^(?:\S*/)?fewbits ([a-z]+)([^#\n]*)", block, re.MULTILINE
        ):
            assert command in helps
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) <= helps[command]
    known = set().union({"--help"}, *helps.values())
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if not code.startswith(("pip ", "make ", "git ", "python ")):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)) <= known, code


@page
def test_toml_blocks_are_configs_or_studies(page, tmp_path):
    for _, block in blocks(page, "toml"):
        path = tmp_path / "config.toml"
        path.write_text(block)
        if "[[grid]]" in block:
            assert len(read_study(path).cells) > 1
        else:
            Config(**read_toml(path))


@pytest.mark.parametrize("path", sorted(ROOT.glob("studies/*.toml")), ids=lambda p: p.stem)
def test_the_studies_that_are_shipped_can_be_read(path):
    assert len(read_study(path).cells) > 1


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("settings", [field.name for field in dataclasses.fields(Config)]),
        ("methods", list(METHODS)),
        ("regularizers", list(REGULARIZERS)),
        ("keys of a row", list(ROW_KEYS)),
    ],
)
def test_guide_explains_every_name(what, names):
    explained = re.findall(r"`([^`\n]+)`", prose(GUIDE))
    assert set(names) <= set(explained), what


def test_guide_gives_the_keys_of_a_row_in_their_order():
    table = prose(GUIDE).partition("### Rows")[2].partition("\n### ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == ROW_KEYS


def loaded(name):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    return module


def test_the_pages_of_results_are_what_their_data_files_say():
    module = loaded("results_page")
    files = sorted((ROOT / "docs" / "results").glob("*.json"))
    assert {file.stem for file in files} >= {"digits"}
    for file in files:
        assert module.page(json.loads(file.read_text())) == file.with_suffix(".md").read_text()
    for file in sorted((ROOT / "docs" / "results").glob("*/results.json")):
        assert study_page(json.loads(file.read_text())) == (file.parent / "report.md").read_text()
    for name in ("minilm", "seven_billion"):
        made = loaded(name)
        assert made.PAGE.read_text() == made.page(made.results()), name
    made = loaded("drops")
    assert made.MARK.search((ROOT / "docs" / "choosing.md").read_text())
    assert made.ONE.search((ROOT / "docs" / "results" / "README.md").read_text())
    for file in (ROOT / "docs").rglob("*.md"):
        assert made.filled(file.read_text()) == file.read_text(), file
    readme = (ROOT / "README.md").read_text()
    assert "| float32 |" in readme
    assert module.filled(readme) == readme
