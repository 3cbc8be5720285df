"""The import arrows of docs/design.md, read from the source text of every module.

vocabulary <- kernels.ops <- models
vocabulary <- tiers, prefetch
everything <- orchestration <- cli
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VOCABULARY = {
    f"offload.{name}" for name in ("errors", "units", "elements", "blocks", "config", "results", "telemetry", "writing")
}
CHOOSES_A_FORMAT = "offload.models.text"  # each tokenizer library costs memory that the other format does not need
MAY_HOLD_TORCH = (
    "offload.kernels.torch",
    "offload.kernels.triton",
    "offload.tiers.device_errors",
    "offload.tiers.link",
    "offload.tiers.pinned",
    "offload.tiers.vram",
)
FOLDERS = ("offload", "tiers", "prefetch", "models", "cli")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    dotted = ".".join(parts if parts[0] == "offload" else ("offload", *parts))
    return dotted.removesuffix(".__init__")


MODULES = {
    module_name(path): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)
}


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names that a subtree imports; `from a.b import c` counts as a.b.c where that is a module of ours."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in MODULES else child.module for name in names)


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def first_party(module: str) -> set[str]:
    return {name for name in imports(tree(module)) if within(name, "offload")}


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def of(*packages: str) -> list[str]:
    return sorted(module for module in MODULES if within(module, *packages))


def test_the_tree_was_found() -> None:
    assert {"offload.units", "offload.models.base", "offload.kernels.ops"} <= set(MODULES)


@pytest.mark.parametrize("module", sorted(VOCABULARY & set(MODULES)))
def test_vocabulary_needs_the_standard_library_only(module: str) -> None:
    foreign = {name for name in imports(tree(module)) if name.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign <= VOCABULARY


@pytest.mark.parametrize("package", ["offload.tiers", "offload.prefetch"])
def test_tiers_and_prefetch_know_the_vocabulary_only(package: str) -> None:
    for module in of(package):
        strangers = {name for name in first_party(module) if name not in VOCABULARY and not within(name, package)}
        assert not strangers, (module, strangers)


def test_sessions_know_the_vocabulary_and_how_files_are_read() -> None:
    allowed = VOCABULARY | {"offload.tiers.files"}
    for module in of("offload.sessions"):
        strangers = {
            name for name in first_party(module) if name not in allowed and not within(name, "offload.sessions")
        }
        assert not strangers, (module, strangers)


def test_models_know_the_vocabulary_and_the_kernel_protocol() -> None:
    allowed = VOCABULARY | {"offload.kernels.ops"}
    for module in of("offload.models"):
        strangers = {name for name in first_party(module) if name not in allowed and not within(name, "offload.models")}
        assert not strangers, (module, strangers)


def test_nothing_but_the_command_line_knows_the_command_line() -> None:
    for module in sorted(set(MODULES) - set(of("offload.cli"))):
        assert not {name for name in first_party(module) if within(name, "offload.cli")}, module


def test_torch_is_named_only_where_tensors_of_a_device_live() -> None:
    """torch costs 200 MB of resident memory, which a CPU run would take from the user's budget."""
    holders = [module for module in MODULES if any(within(name, "torch") for name in imports(tree(module)))]
    assert [module for module in holders if not within(module, *MAY_HOLD_TORCH)] == []


def test_modules_that_hold_torch_are_imported_lazily_or_by_their_own_kind() -> None:
    for module in sorted(set(MODULES) - set(of(*MAY_HOLD_TORCH))):
        at_import = {name for node in top_level(tree(module)) for name in imports(node)}
        assert not {name for name in at_import if within(name, *MAY_HOLD_TORCH)}, module


def top_level(module: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run on import; function bodies and `if TYPE_CHECKING` do not."""
    for node in module.body:
        guarded = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if not guarded and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node


def test_a_function_imports_our_own_modules_only_to_stay_lazy() -> None:
    """Elsewhere such an import hides a cycle. The command line defers for start-up time, torch for memory."""
    for module in sorted(set(MODULES) - {CHOOSES_A_FORMAT, *of("offload.cli")}):
        functions = [
            node for node in ast.walk(tree(module)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        hidden = {name for node in functions for name in imports(node) if within(name, "offload")}
        assert not {name for name in hidden if not within(name, *MAY_HOLD_TORCH)}, (module, hidden)


LOADED_TWICE = """
import pathlib, pkgutil, importlib, sys
import offload
HOLDS_TORCH = tuple(sys.argv[2:])
for found in pkgutil.walk_packages(offload.__path__, "offload."):
    if not found.name.startswith(HOLDS_TORCH):
        importlib.import_module(found.name)
seen = {}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and pathlib.Path(file).resolve().is_relative_to(sys.argv[1]):
        seen.setdefault(pathlib.Path(file).resolve(), set()).add(name)
print([sorted(names) for names in seen.values() if len(names) > 1], "torch" in sys.modules, len(seen))
"""


def test_importing_everything_loads_no_file_twice_and_no_torch() -> None:
    command = [sys.executable, "-c", LOADED_TWICE, str(ROOT), *MAY_HOLD_TORCH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    twice, torch, count = done.stdout.rsplit(maxsplit=2)
    assert (twice, torch) == ("[]", "False")
    assert int(count) >= len([module for module in MODULES if not within(module, *MAY_HOLD_TORCH)])
