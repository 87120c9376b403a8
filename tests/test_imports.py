"""Imports go one way: launch → pipeline → {model, data_prep}; and heavy ones stay where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {  # besides its own folder and vitscale.errors
    "model": set(),
    "data_prep": set(),
    "pipeline": {"model", "data_prep"},
    "launch": {"pipeline", "model", "data_prep"},
}
SOLE_OWNERS = {"deepspeed": "pipeline/engine.py", "omegaconf": "pipeline/recipe.py"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_one_way(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            words = name.split(".")
            assert words[0] not in MAY_IMPORT, f"{path} imports {name}: write vitscale.{name}"
            if words[0] == "vitscale" and len(words) > 1:
                allowed = MAY_IMPORT[folder] | {folder, "errors"}
                assert words[1] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize(("package", "owner"), SOLE_OWNERS.items())
def test_one_file_alone_imports(package: str, owner: str) -> None:
    importers = {
        str(path.relative_to(ROOT))
        for folder in MAY_IMPORT
        for path in (ROOT / folder).rglob("*.py")
        if any(name.split(".")[0] == package for name in imports(path))
    }
    assert importers == {owner}


def test_data_prep_needs_no_torch() -> None:
    for path in (ROOT / "data_prep").rglob("*.py"):
        assert not any(name.split(".")[0] == "torch" for name in imports(path)), path


def test_help_and_recipes_load_no_torch() -> None:
    script = "import sys, vitscale, vitscale.launch.cli, vitscale.pipeline.config; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
