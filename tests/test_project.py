"""The house rules: who may import whom, what is listed where, and that the README is true."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from onnxq.passes import PASSES

ROOT = Path(__file__).parent.parent
# Modules of passes/ that are no passes: what several passes share.
SHARED = {
    "ops", "work", "costs", "placement", "ranges", "sensitive", "linear",
    "sizes", "size_algebra", "shape_rules", "streamed", "value_rules", "activations",
    "formats", "insertion", "float_layers", "encodings", "layouts", "weight_kernels",
    "integer_weights", "packed_weights", "recovery", "recover_dynamic", "recover_qoperators",
    "weight_storage", "weight_plans", "codebook_encoding", "bitmaps", "coding", "importance",
    "dynamic_costs", "dynamic_layers", "grams", "meetings", "observing", "solving",
    "static_rounding", "codebook_plans",
    "moves", "pairs", "switches", "range_simulation", "range_search", "range_mixing",
    "halves", "half_storage", "half_forms", "half_rules", "half_ranges", "half_regions",
    "half_masks", "rescaling", "sites", "channels", "channel_moves", "moments", "data_free",
    "biases", "empirical_bias", "paired", "masks", "prunable", "prune_curves", "pruning", "removal",
    "removal_edits", "unit_choice", "unit_labels", "unit_layers", "unit_moves", "unit_rules",
    "unit_budget", "unit_curves", "unit_plans", "unit_readers", "unit_repair", "unit_trials",
}  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_from(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "onnxq/numerics").glob("*.py")), ids=lambda p: p.stem
)
def test_numerics_import_numpy_alone(path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        allowed = (
            top in sys.stdlib_module_names or top == "numpy" or is_from(name, "onnxq.numerics")
        )
        assert allowed, name


def test_only_runtime_makes_sessions() -> None:
    for path in (*(ROOT / "onnxq").rglob("*.py"), *(ROOT / "passes").glob("*.py")):
        users = [name for name in imports(path) if is_from(name, "onnxruntime")]
        assert not users or path.name == "runtime.py", path


def test_passes_do_not_import_each_other() -> None:
    for path in (ROOT / "passes").glob("*.py"):
        if path.stem == "__init__":
            continue
        for name in imports(path):
            if is_from(name, "onnxq.passes") and name != "onnxq.passes":
                assert name.split(".")[2] in SHARED, f"{path.name} imports {name}"


def test_nobody_imports_the_command_line() -> None:
    for path in (*(ROOT / "onnxq").rglob("*.py"), *(ROOT / "passes").glob("*.py")):
        users = [name for name in imports(path) if is_from(name, "onnxq.cli")]
        assert not users or path.name == "__main__.py" or path.parent.name == "cli", path


def test_every_pass_is_listed() -> None:
    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - SHARED - {"__init__"}
    assert files == set(PASSES) - {"cleanup"}
    for name, entry in PASSES.items():
        assert name == "cleanup" or isinstance(entry, type) or entry.name == name


def test_the_wheel_has_all_packages() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "onnxq").rglob("__init__.py")
    }
    assert listed == found | {"onnxq.passes"}
    assert (ROOT / "onnxq/passes").is_symlink()


README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", README, ids=["optimize", "passes", "own-pass"])
def test_the_readme_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(
        compile(code.replace("/tmp/", f"{tmp_path}/"), "README.md", "exec"), {"__name__": "readme"}
    )


def test_all_benchmarks_are_listed() -> None:
    folder = ROOT / "tests" / "bench"
    text = (folder / "README.md").read_text()
    assert [p.name for p in folder.glob("bench_*.py") if f"`{p.name}" not in text] == []
