"""Imports go one way, and importing the command line costs nothing."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lepton_ray"

# A layer imports from the ones above it. Those in one line know nothing of each other.
LAYERS = (
    {"errors"},
    {"priority", "storage", "terminal"},
    {"config"},
    {"data"},
    {"models"},
    {"training"},
    {"tuning", "tracking"},
    {"serving"},
    {"jobs"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
)
RANK = {layer: rank for rank, layers in enumerate(LAYERS) for layer in layers}


@dataclass(frozen=True)
class Import:
    importer: str
    """The module that imports, such as ``lepton_ray.data.order``."""
    line: int
    target: str
    """What it imports: a module, or a name in one."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def imports_of(tree: ast.AST, module: str, package: str) -> Iterator[Import]:
    """Every import, those in functions and under TYPE_CHECKING too; lazy ones by literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            origin = importlib.util.resolve_name(origin, package)
            for alias in node.names:
                yield Import(module, node.lineno, f"{origin}.{alias.name}")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in ("import_module", "__import__"):
                yield Import(module, node.lineno, str(node.args[0].value))


def read_package() -> dict[str, list[Import]]:
    """Module -> its imports."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        package = ".".join(parts[:-1])
        module = package if parts[-1] == "__init__" else ".".join(parts)
        found[module] = list(imports_of(ast.parse(path.read_text()), module, package))
    return found


MODULES = read_package()


def layer_of(dotted: str) -> str:
    """The part after ``lepton_ray``; empty for the package itself."""
    return dotted.split(".")[1] if "." in dotted else ""


def is_within(target: str, package: str) -> bool:
    return target == package or target.startswith(f"{package}.")


def reached_from(modules: Iterable[str]) -> set[str]:
    """The modules of the package that importing these may load, now or inside a function."""
    reached: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        while name not in MODULES and "." in name:  # a function or class: the module it is in
            name = name.rpartition(".")[0]
        if name in MODULES and name not in reached:
            reached.add(name)
            waiting += [found.target for found in MODULES[name]]
            waiting.append(name.rpartition(".")[0])  # a module's packages are loaded with it
    return reached


def third_party(modules: Iterable[str], package: str) -> list[str]:
    return [str(i) for m in sorted(modules) for i in MODULES[m] if is_within(i.target, package)]


def test_every_module_has_a_layer() -> None:
    unknown = {layer_of(module) for module in MODULES} - RANK.keys() - {""}
    assert not unknown, f"give these a place in LAYERS: {sorted(unknown)}"


def test_imports_go_one_way() -> None:
    upward = [
        str(found)
        for module, imports in MODULES.items()
        for found in imports
        if is_within(found.target, "lepton_ray")
        if not may_import(layer_of(module), layer_of(found.target))
    ]
    assert not upward, "\n".join(upward)


def may_import(importer: str, imported: str) -> bool:
    if importer == imported or imported in ("", "__version__"):
        return True
    # Other names of the package itself are lazy doors into any layer, so only the public uses them.
    if importer not in RANK or imported not in RANK:
        return False
    return RANK[imported] < RANK[importer]


def test_training_knows_no_mlflow() -> None:
    training = [module for module in MODULES if layer_of(module) == "training"]
    assert training
    found = third_party(reached_from(training), "mlflow")
    assert not found, "\n".join(found)


def test_a_model_runs_without_ray() -> None:
    needless = ("lepton_ray.serving.runtime", "lepton_ray.serving.api", "lepton_ray.serving.client")
    runtime = [m for m in MODULES if m.startswith(needless)]
    assert len(runtime) >= 3
    found = third_party(reached_from(runtime), "ray")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("lepton_ray.cli", ("torch", "ray", "mlflow", "pandas")),
        ("lepton_ray.jobs.submission", ("torch", "mlflow", "pandas")),
        ("lepton_ray.jobs.driver", ("torch", "ray", "mlflow", "pandas")),
        ("lepton_ray.serving.app", ("torch", "mlflow")),
        ("lepton_ray.pipeline.run", ("ray.tune", "ray.serve")),
        ("lepton_ray.pipeline.models", ("torch", "ray.train", "ray.tune")),
        ("lepton_ray.pipeline.status", ("torch", "ray.train", "ray.tune", "ray.serve")),
    ],
)
def test_what_is_waited_for_loads_nothing_heavy(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import {module}, sys; print(*sorted(sys.modules.keys() & set({heavy})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_every_form_of_import_is_seen() -> None:
    source = """
import a.b, c
from d import e as f
from . import g
from ..h import i
def later():
    from j import k
    import_module("l.m"), importlib.import_module("n"), other("o")
"""
    seen = imports_of(ast.parse(source), "top.pack.mod", "top.pack")
    targets = {found.target for found in seen}
    assert targets == {"a.b", "c", "d.e", "top.pack.g", "top.h.i", "j.k", "l.m", "n"}
