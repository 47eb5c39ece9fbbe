"""Imports point down: the folders of safestep are its layers, from top to bottom in one list."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"safestep": ROOT / "safestep", "safestep.callbacks": ROOT / "callbacks"}

# From top to bottom: each may import what stands below it, none what stands above.
LAYERS = (
    "callbacks",
    "cli",
    "demo",
    "guard",
    "report",
    "plots",
    "workers",
    "measure",
    "capture",
    "runlog",
    "parallel",
    "radius",
    "_torch",
    "_warn",
)
# What a folder may not know, whatever it imports from the package itself.
_EDGES = ("torch.optim", "torch.distributed", "torch.nn.parallel", "lightning", "rich")
FORBIDDEN = {
    "radius": ("torch.nn", *_EDGES),
    "parallel": ("lightning", "rich", "torch.optim"),
    "capture": _EDGES,
    "measure": _EDGES,
    "report": _EDGES[:-1],
    "plots": _EDGES,
}
# Only these may import matplotlib, and nothing that `import safestep` loads imports them.
DRAWS = re.compile(r"safestep\.(plots(\.\w+)?|report(\.\w+)?|demo\.figure)")


def modules() -> dict[str, Path]:
    """Return the file of every module of both packages, by the module's full name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


def layer_of(name: str) -> str:
    """Return the folder of a module, or its own name where it lies flat."""
    return name.split(".")[1]


def imports_of(name: str) -> Iterator[str]:
    """Yield the full name of everything a module imports, inside functions too."""
    is_package = MODULES[name].name == "__init__.py"
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")
            above = above[: len(above) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_module(imported: str) -> str | None:
    """Return the module of the two packages that a name is imported from."""
    while imported and imported not in MODULES:
        imported = imported.rpartition(".")[0]
    return imported or None


def is_under(imported: str, prefix: str) -> bool:
    return imported == prefix or imported.startswith(f"{prefix}.")


# The package's own __init__ and __main__ gather names of all layers.
LAYERED = sorted(name for name in MODULES if name not in {"safestep", "safestep.__main__"})


@pytest.mark.parametrize("name", LAYERED)
def test_a_module_imports_only_from_its_own_folder_and_those_below(name):
    rank = LAYERS.index(layer_of(name))

    for imported in imports_of(name):
        module = own_module(imported)
        if module == "safestep":
            pytest.fail(f"{name} imports {imported}: name the module that defines it.")
        if module is not None:
            assert LAYERS.index(layer_of(module)) >= rank, (
                f"{name} imports {module}, which stands above it: move what it needs down, or "
                "itself up."
            )
        culprits = [p for p in FORBIDDEN.get(layer_of(name), ()) if is_under(imported, p)]
        assert not culprits, f"{name} imports {imported}, which is not its to know."


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_does_not_draw_unless_it_is_a_figure(name):
    if not DRAWS.fullmatch(name):
        culprits = [imported for imported in imports_of(name) if is_under(imported, "matplotlib")]
        assert not culprits, (
            f"{name} imports {culprits[0]}: move what draws to a module of figures, or name this "
            "one in DRAWS."
        )


def test_no_module_lies_flat_beside_the_folders():
    flat = {path.stem for path in FOLDERS["safestep"].glob("*.py")}

    assert flat <= {"__init__", "__main__", "cli", "_torch", "_warn"}


def test_every_folder_is_installed():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {name for name, path in MODULES.items() if path.name == "__init__.py"}

    assert set(settings["tool"]["setuptools"]["packages"]) == folders
    assert len(folders) <= 12  # the package itself and eleven folders


@pytest.mark.parametrize("name", [name for name in LAYERED if MODULES[name].stem == "__init__"])
def test_a_folder_says_what_it_is_for_and_what_it_imports(name):
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or ""

    assert "may import" in docstring or "imports nothing" in docstring, docstring


def test_importing_safestep_loads_neither_lightning_nor_matplotlib():
    program = (
        "import sys, safestep;"
        "print([name for name in ('lightning', 'matplotlib', 'rich', 'sklearn', 'transformers')"
        " if name in sys.modules])"
    )

    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
    )  # fmt: skip

    assert result.stderr == ""
    assert result.stdout.strip() == "[]"
