"""The package's layout: sizes of modules and classes, and the direction of imports (README, file tree)."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "lerobot_vla0"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Which folders a folder may import from, besides itself and the root's modules. "" is the root.
ALLOWED = {
    "": {"decoding"},
    "decoding": {"decoding"},
    "libero": set(),
    "training": {"libero"},
    "convert": {"libero"},
    "demo": {"libero"},
    "bench": {"demo", "decoding", "libero"},
}
# Imports inside functions that point up, with the reason at the place.
EXCEPTIONS = {("modeling_vla0", "convert.card")}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def folder_of(module: str) -> str:
    return module.partition(".")[0] if (PACKAGE / module.partition(".")[0]).is_dir() else ""


@cache
def imports_of(path: Path) -> set[str]:
    """Modules of this package that a module imports, anywhere in it, as dotted names below the package."""
    known, found = {name_of(p) for p in MODULES}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = path.relative_to(PACKAGE).parts[: len(path.relative_to(PACKAGE).parts) - node.level]
        module = ".".join([*base, *filter(None, [node.module])])
        for alias in node.names:
            whole = f"{module}.{alias.name}".strip(".")
            found.add(whole if whole in known else module)
    return found - {""}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_and_class_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 330
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno + 1 <= 250, node.name


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    module = name_of(path)
    if module in ("cli", "__init__"):
        return
    folder = folder_of(module)
    for other in imports_of(path):
        assert other != "cli", "nothing imports the command line"
        if (module, other) in EXCEPTIONS:
            continue
        assert folder_of(other) in ALLOWED[folder] | {folder, ""}, f"{module} imports {other}"


def test_floors_of_the_root():
    """The longest chain of imports among the root's modules has at most five of them; there is no circle."""
    graph = {name_of(p): imports_of(p) for p in MODULES}

    @cache
    def below(module: str) -> frozenset[str]:
        """Root modules that a module imports, directly or through a folder's modules."""
        found, todo = set(), [module]
        while todo:
            for other in graph[todo.pop()]:
                if (module, other) in EXCEPTIONS:
                    continue
                if "." in other:
                    todo.append(other)
                elif other != module:
                    found.add(other)
        return frozenset(found)

    def floor(module: str, above: tuple[str, ...] = ()) -> int:
        assert module not in above, f"circle: {' → '.join([*above, module])}"
        return 1 + max((floor(m, (*above, module)) for m in below(module)), default=0)

    root = [m for m in graph if "." not in m and not (PACKAGE / m).is_dir() and m != "__init__"]
    floors = {module: floor(module) for module in root}
    assert max(floors.values()) <= 5, floors


@pytest.mark.slow
def test_policy_needs_no_folder_that_only_some_users_need():
    code = """
import sys, lerobot_vla0.modeling_vla0
print([n for n in sys.modules if n.startswith("lerobot_vla0.")])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(result.stdout.splitlines()[-1])
    unwanted = ("training", "convert", "demo", "bench", "cli")
    assert not [n for n in loaded if n.split(".")[1] in unwanted]
    # The config of --env.type=vla0_libero is registered, because LeRobot has imported its own; no more.
    assert not {"lerobot_vla0.libero.env", "lerobot_vla0.libero.evaluate"} & set(loaded)
