"""The shape of the package: what may import what, what is public, and that it is documented."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import fewbits

SRC = pathlib.Path(fewbits.__file__).parent

# Lowest first: a module imports only from rows above its own.
LAYERS = [
    {"_errors", "_html", "_threads"},
    {"_kernels", "_symbols"},
    {"_kmeans", "schedules", "_rules", "_indexed", "_sharded", "_processes"},
    {"_codebook", "_packed"},
    {"regularizers", "_plan"},
    {"_file"},
    {"compressed", "_loading"},
    {"_pull", "_together"},
    {"_snapped", "_resolve"},
    {"_attach"},
    {"_stack", "_care", "_gap"},
    {"_penalty"},
    {"_clustering", "_quantize"},
    {"_checkpoint"},
    {"_summary"},
    {"_finetune"},
    {"_allocate", "export"},
    {"report"},
    {"integrations"},
    {"lab"},
    {"_bars"},
    {"_cli_files", "_cli_study"},
    {"_cli_export"},
    {"_cli"},
    {"__main__"},
]
RANK = {name: row for row, names in enumerate(LAYERS) for name in names}


def imports(path: pathlib.Path) -> set[str]:
    """First name under `fewbits` of every import in the file, function bodies included."""
    package = ("fewbits", *path.relative_to(SRC).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            head = ".".join((*base, *filter(None, [node.module])))
            full = [f"{head}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in full if name.startswith("fewbits.")}
    return found


def fresh(code: str) -> set[str]:
    """Words printed by `code` in a new interpreter, which has imported nothing yet."""
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_imports_point_downwards():
    for path in SRC.rglob("*.py"):
        module = path.relative_to(SRC).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        row = RANK[module]
        up = {m for m in imports(path) if m != module and RANK.get(m, len(LAYERS)) >= row}
        assert not up, f"{path.relative_to(SRC)} imports {sorted(up)}, which are not below it"


def test_every_module_has_a_layer():
    there = {
        p.name.removesuffix(".py") for p in SRC.iterdir() if p.name[0] not in ".p" or p.is_dir()
    }
    assert there - {"__init__", "__pycache__", "py.typed"} == set(RANK)


def test_public_names_are_the_ones_in_all():
    public = fresh("import fewbits; print(*(n for n in vars(fewbits) if n[0] != '_'))")
    assert public == set(fewbits.__all__)


def test_import_loads_nothing_heavy():
    top = "print(*{m.partition('.')[0] for m in sys.modules})"
    ours, torchs = fresh(f"import sys, fewbits; {top}"), fresh(f"import sys, torch; {top}")
    assert ours - torchs <= {"fewbits", "numpy"}


def test_import_loads_what_clustering_needs_and_no_more():
    # What `import fewbits` adds to torch's own time is what it loads beside it.
    loaded = "print(*sys.modules)"
    ours, torchs = fresh(f"import sys, fewbits; {loaded}"), fresh(f"import sys, torch; {loaded}")
    assert not [name for name in ours - torchs if name.startswith("torch.")]
    late = ("fewbits.lab", "fewbits.report", "fewbits._cli", "fewbits._bars")
    assert not [name for name in ours if name.startswith(late)]


def callables():
    for name in fewbits.__all__:
        thing = getattr(fewbits, name)
        if inspect.ismodule(thing):
            for inner, value in vars(thing).items():
                if inner[0] != "_" and getattr(value, "__module__", "").startswith(thing.__name__):
                    yield f"{name}.{inner}", value
        else:
            yield name, thing


CALLABLES = {
    name: thing
    for name, thing in callables()
    if callable(thing) and not (inspect.isclass(thing) and issubclass(thing, Exception))
}


def undocumented(thing) -> list[str]:
    """Parameters of a public callable that its docstring does not list."""
    doc = inspect.getdoc(thing) or ""
    return [
        p.name
        for p in inspect.signature(thing).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and not re.search(rf"^ +{p.name}: ", doc, re.MULTILINE)
    ]


@pytest.mark.parametrize("name", CALLABLES)
def test_every_parameter_of_a_public_name_is_documented(name):
    assert not undocumented(CALLABLES[name])


METHODS = {
    f"{name}.{attribute}": method
    for name, thing in CALLABLES.items()
    if inspect.isclass(thing)
    for attribute, method in vars(thing).items()
    if attribute[0] != "_" and inspect.isfunction(method)
}


@pytest.mark.parametrize("name", METHODS)
def test_every_public_method_says_what_it_does(name):
    assert METHODS[name].__doc__
