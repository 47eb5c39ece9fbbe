"""Imports point down: each module names its layer in its docstring, and is held to it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"safestep": ROOT / "safestep", "safestep.callbacks": ROOT / "callbacks"}

# What a layer may not know, whatever it imports from the package itself.
_EDGES = ("torch.optim", "torch.distributed", "torch.nn.parallel", "lightning", "rich")
FORBIDDEN = {
    0: ("torch.nn", *_EDGES),
    1: _EDGES,
    2: _EDGES,
    3: ("lightning",),
    4: (),
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


def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def layer_of(name: str) -> int:
    """Return the layer that a module's docstring begins with."""
    docstring = ast.get_docstring(tree_of(name)) or ""
    match = re.match(r"Layer ([0-4])\b", docstring)
    assert match, (
        f"{MODULES[name].relative_to(ROOT)}: expected the module docstring to begin with its "
        f"layer, got {docstring[:40]!r}. Write 'Layer N: what it does', N from 0 (maths) to 4 "
        "(adapters)."
    )
    return int(match[1])


def imports_of(name: str) -> Iterator[str]:
    """Yield the full name of everything a module imports, inside functions too."""
    is_package = MODULES[name].name == "__init__.py"
    for node in ast.walk(tree_of(name)):
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


# The packages' __init__ only gather names, of all layers below the adapters.
LAYERED = sorted(name for name, path in MODULES.items() if path.name != "__init__.py")


@pytest.mark.parametrize("name", LAYERED)
def test_a_module_imports_only_from_its_own_layer_and_those_below(name):
    layer = layer_of(name)

    for imported in imports_of(name):
        module = own_module(imported)
        if module == "safestep":
            pytest.fail(f"{name} imports {imported}: name the module that defines it.")
        if module in LAYERED:
            assert layer_of(module) <= layer, (
                f"{name} (layer {layer}) imports {module} (layer {layer_of(module)}): move what "
                "it needs down, or itself up."
            )
        culprits = [prefix for prefix in FORBIDDEN[layer] if is_under(imported, prefix)]
        assert not culprits, f"{name} (layer {layer}) imports {imported}, which is not its to know."


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_does_not_draw_unless_it_is_a_figure(name):
    if not DRAWS.fullmatch(name):
        culprits = [imported for imported in imports_of(name) if is_under(imported, "matplotlib")]
        assert not culprits, (
            f"{name} imports {culprits[0]}: move what draws to a module of figures, or name this "
            "one in DRAWS."
        )


def test_adapters_are_exactly_the_callbacks():
    adapters = {name for name in LAYERED if layer_of(name) == 4}

    assert adapters == {name for name in LAYERED if name.startswith("safestep.callbacks.")}


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
