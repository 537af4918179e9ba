"""The guards that the folder layout needs (docs/decisions/001-layout.md)."""

from __future__ import annotations

import ast
import gc
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

FACES = {
    "rerampile",
    "rerampile.__main__",
    "rerampile.cli",
    "rerampile.compiler",
    "rerampile.chip_calibration",
    "rerampile.asked_constraint",
    "rerampile.pruner",
    "rerampile.searcher",
    "rerampile.programmer",
}
"""The modules that may see everything, as the commands may; all others are passes, runtime or core."""

ONE_MACHINE = re.compile(r"(?<![\w.])/(?:work|tmp|home|root)/")


@pytest.fixture(scope="module")
def folders(project_root: Path) -> dict[str, Path]:
    """The folder of each package, as pyproject.toml maps them."""
    return {name: project_root / folder for name, folder in _setuptools(project_root)["package-dir"].items()}


@pytest.fixture(scope="module")
def modules(folders: dict[str, Path]) -> dict[str, Path]:
    """The file of each module, by import name."""
    return {
        package if path.stem == "__init__" else f"{package}.{path.stem}": path
        for package, folder in folders.items()
        for path in folder.glob("*.py")
    }


def test_every_package_on_disk_is_listed(project_root: Path, folders: dict[str, Path]) -> None:
    on_disk = {
        ".".join([name, *init.parent.relative_to(folder).parts])
        for name, folder in folders.items()
        for init in folder.rglob("__init__.py")
    }
    assert set(_setuptools(project_root)["packages"]) == on_disk


def test_core_passes_and_runtime_import_one_way(modules: dict[str, Path]) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in modules.items()
        for target in _imports(name, path, modules)
        if not _may_import(name, target)
    ]
    assert wrong == [], "core <- passes, runtime <- rerampile.cli, rerampile.compiler; passes and runtime never meet"


@pytest.mark.parametrize(
    ("name", "target", "allowed"),
    [
        ("rerampile.cli", "rerampile.runtime.session", True),
        ("rerampile.passes.prune", "rerampile.layer", True),
        ("rerampile.passes.prune", "rerampile.passes.masks", True),
        ("rerampile.passes.prune", "rerampile.runtime", False),
        ("rerampile.runtime.session", "rerampile.passes", False),
        ("rerampile.layer", "rerampile.passes.prune", False),
        ("rerampile.layer", "rerampile.cli", False),
        ("rerampile.passes.prune", "rerampile.compiler", False),
    ],
)
def test_the_one_way_rule_itself(name: str, target: str, allowed: bool) -> None:
    assert _may_import(name, target) is allowed


def test_imports_are_seen_in_every_form(tmp_path: Path) -> None:
    source = tmp_path / "prune.py"
    source.write_text(
        "import numpy\nimport rerampile.a\nfrom rerampile import b, thing\nfrom . import sibling\n"
        "def later():\n    from ..runtime.c import d\n"
    )
    known = dict.fromkeys(["rerampile.b", "rerampile.passes.sibling"], source)
    assert set(_imports("rerampile.passes.prune", source, known)) == {
        "rerampile.a",
        "rerampile.b",
        "rerampile",
        "rerampile.passes.sibling",
        "rerampile.runtime.c",
    }


def test_no_second_copy_is_imported() -> None:
    assert not {"passes", "runtime"} & set(sys.modules)


def test_help_is_instant() -> None:
    """The library and everything heavy behind it stay unimported until there is work."""
    probe = (
        "import sys, contextlib, rerampile.cli\n"
        "with contextlib.suppress(SystemExit): rerampile.cli.main(['--help'])\n"
        "print(*sorted({'numpy', 'onnx', 'onnxruntime', 'onnx_graphsurgeon'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert "Usage:" in done.stdout
    assert done.stderr.split() == []


def test_no_file_names_a_path_of_one_machine(project_root: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=project_root, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    found = []
    for path in (project_root / name for name in listed.stdout.split("\0") if name):
        if not path.is_file() or b"\0" in (content := path.read_bytes())[:8192]:
            continue  # deleted in the working tree, or binary
        lines = content.decode("utf-8", "replace").splitlines()
        found += [
            f"{path.relative_to(project_root)}:{i}: {line}"
            for i, line in enumerate(lines, 1)
            if ONE_MACHINE.search(line)
        ]
    assert found == []


def _setuptools(root: Path) -> dict[str, dict[str, str]]:
    return tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]


def _parsed(path: Path) -> ast.Module:
    """Parse without garbage collection: what that logs of forgotten tasks parses, too, and Python 3.11 gets lost."""
    gc.disable()
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    finally:
        gc.enable()


def _imports(name: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of this project that one imports, wherever in the file it does."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            targets = [full if (full := f"{base}.{alias.name}") in modules else base for alias in node.names]
        else:
            continue
        yield from (target for target in targets if target.split(".")[0] == "rerampile")


def _may_import(name: str, target: str) -> bool:
    part, other = _part(name), _part(target)
    return part == "face" or other in {part, "core"}


def _part(name: str) -> str:
    if name in FACES or name.startswith("rerampile.commands"):
        return "face"
    second = name.split(".")[1]
    return second if second in {"passes", "runtime"} else "core"


def test_what_is_imported_is_installed_with_the_package(project_root: Path) -> None:
    """In a test environment anything may be there; a user has what pyproject.toml names, and what that brings.

    What the extra `cluster` names is imported inside functions alone, which say so where it is not there. What `train`
    names is imported in rerampile/training, which the command imports after it has looked for torch.
    """
    project = tomllib.loads((project_root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named, cluster, train = (
        {re.match(r"[\w-]+", need)[0].lower().replace("-", "_") for need in needs}
        for needs in (project["dependencies"], extras["cluster"], extras["train"])
    )
    named |= {"pil" if name == "pillow" else name for name in named} | {"google"}  # protobuf comes with onnx
    imported: set[str] = set()
    for folder in ("rerampile", "passes", "runtime"):
        for path in sorted((project_root / folder).rglob("*.py")):
            tree = _parsed(path)
            everywhere = train if path.parent.name == "training" else set()
            for node in ast.walk(tree):
                found: set[str] = set()
                if isinstance(node, ast.Import):
                    found = {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    found = {node.module.split(".")[0]}
                imported |= (found if node in tree.body else found - cluster - train) - everywhere
    foreign = {name for name in imported if name not in sys.stdlib_module_names} - {"rerampile"}
    assert {name for name in foreign if name.lower() not in named} == set()
