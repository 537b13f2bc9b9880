"""Which part of the project may import which: what ARCHITECTURE.md says, held against every module."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = {"isolation": ROOT, "pytest_isolation": ROOT / "plugins", "isolation_kernel": ROOT / "kernels"}
IMPORT = re.compile(r"from ((?:isolation|pytest_isolation|isolation_kernel)[\w.]*) import ([\w, ]+)")
NAMESPACE, MICROVM = "isolation.backends.namespace", "isolation.backends.microvm"
# What the first part never imports, not even late: the second, but for what has a "!" before it.
NEVER = {
    "isolation.linux": ["isolation", "!isolation.linux", "!isolation.errors", "!isolation.plain"],
    "isolation.plain": ["isolation", "!isolation.plain"],
    "isolation.guest": ["isolation.backends", "pytest_isolation", "isolation_kernel"],
    f"{NAMESPACE}.rootfs": [f"{NAMESPACE}.{name}" for name in ("host", "supervisor", "checkpoints", "process")],
    f"{NAMESPACE}.process": [f"{NAMESPACE}.{name}" for name in ("host", "supervisor", "planner")],
    f"{NAMESPACE}.checkpoints": [f"{NAMESPACE}.{name}" for name in ("host", "supervisor", "planner")],
    f"{NAMESPACE}.supervisor": [f"{NAMESPACE}.host"],
    NAMESPACE: [MICROVM, "pytest_isolation", "isolation_kernel"],
    f"{MICROVM}.guest": [MICROVM, f"!{MICROVM}.guest", NAMESPACE],
    f"{MICROVM}.artifacts": [f"{MICROVM}.vm"],
    MICROVM: ["pytest_isolation", "isolation_kernel"],
    "pytest_isolation.wire": ["pytest_isolation.host", "pytest_isolation.inside"],
    "pytest_isolation.inside": ["pytest_isolation.host", "pytest_isolation.report"],
    "pytest_isolation": ["isolation_kernel", NAMESPACE, MICROVM],
    "isolation_kernel.protocol": [f"isolation_kernel.{name}" for name in ("container", "machine", "inside", "pool")],
    "isolation_kernel.inside": [f"isolation_kernel.{name}" for name in ("container", "machine", "pool")],
    "isolation_kernel": ["pytest_isolation"],
}


def modules() -> Iterator[tuple[str, Path]]:
    for name, place in PLACES.items():
        for path in (place / name).rglob("*.py"):
            yield str(path.relative_to(place).with_suffix("")).replace("/", ".").removesuffix(".__init__"), path


MODULES = dict(modules())


def imports(node: ast.AST, *, late: bool) -> Iterator[str]:
    """Names of our modules that are imported when `node` is executed; with `late`, those in functions, too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and child.module:
            whole = {f"{child.module}.{alias.name}" for alias in child.names}
            yield from (name if name in MODULES else child.module for name in whole)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            if late or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from imports(child, late=late)


def is_part(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.once
@pytest.mark.parametrize("part", NEVER)
def test_what_is_never_imported(part: str) -> None:
    unwanted = [name for name in NEVER[part] if not name.startswith("!")]
    allowed = [name[1:] for name in NEVER[part] if name.startswith("!")]
    members = {name: path for name, path in MODULES.items() if is_part(name, part)}
    assert members
    for name, path in members.items():
        for other in imports(ast.parse(path.read_text()), late=True):
            if any(is_part(other, package) for package in unwanted):
                assert any(is_part(other, package) for package in allowed), f"{name} imports {other}"


@pytest.mark.once
def test_no_module_is_imported_in_a_circle() -> None:
    needs = {
        name: {*imports(ast.parse(path.read_text()), late=False)} & set(MODULES) - {name} for name, path in MODULES.items()
    }
    while free := {name for name, others in needs.items() if not others}:
        needs = {name: others - free for name, others in needs.items() if name not in free}
    assert not needs


@pytest.mark.once
def test_programs_in_strings_import_what_there_is() -> None:
    """Those that another interpreter runs: no linter reads them."""
    looked_at = 0
    for path in (*MODULES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            for module, names in IMPORT.findall(node.value):
                for name in re.findall(r"\w+", re.sub(r" as \w+", "", names)):
                    looked_at += 1
                    if f"{module}.{name}" not in MODULES:
                        assert hasattr(importlib.import_module(module), name), (
                            f"{path}:{node.lineno}: from {module} import {name}"
                        )
    assert looked_at > 20
