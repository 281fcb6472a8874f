"""Imports point strictly down: every module has a layer and imports from lower ones, or from its own room."""
import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = {name: number for number, names in enumerate((
    "config order retry texts",
    "registry tree dist io schedules overrides",
    "models pp datasets losses updates sharding records damage",
    "optax train_state workers checkpoint_arrays workdir monitor augment",
    "train_step input_pipeline checkpoint_reading analysis",
    "checkpoint skip_errors",
    "evaluators weights",
    "distillation prediction",
    "settings",
    "experiment",
    "model_init stream first_batch",
    "startup own_loop",
    "train",
    "tools",
)) for name in names.split()}
# `cb_vit/__init__` and `main.py` stand above; both import on first use only.
FORBIDDEN = {"tensorflow", "torch", "pickle", "cloudpickle", "dill"}


def modules(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path):
    """Names of all modules a file imports, inside functions too; `from a import b` gives "a.b"."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(path):
    """The part of a module's path that has a layer: `models` for `cb_vit/models/vit.py`."""
    return path.relative_to(ROOT / "cb_vit").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules("cb_vit"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    here = room(path)
    targets = [name.split(".")[1] for name in imports(path) if name.startswith("cb_vit.")]
    if here == "__init__":
        assert not targets, "cb_vit/__init__ imports on first use only"
        return
    assert here in LAYERS, f"give {here} a layer in this file"
    for target in targets:
        assert target in LAYERS, f"{path} imports cb_vit.{target}, which has no layer"
        assert target == here or LAYERS[target] < LAYERS[here], \
            f"{here} (layer {LAYERS[here]}) may not import {target} (layer {LAYERS[target]})"


def test_the_table_names_what_is_there():
    there = {room(path) for path in modules("cb_vit")} - {"__init__"}
    assert there == set(LAYERS)


@pytest.mark.parametrize("path", [*modules("cb_vit"), *modules("configs"), ROOT / "main.py"],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_what_may_not_be_imported(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & FORBIDDEN
    if path.is_relative_to(ROOT / "configs"):
        assert roots <= {"ml_collections", "configs", "__future__"} | (
            sys.stdlib_module_names if path.name == "common.py" else set())
        return
    assert "configs" not in roots
    flags = any(name.startswith(("absl.flags", "absl.app")) for name in imports(path))
    assert not flags or path.stem == "workers"  # those of Grain want absl's flags parsed


def test_the_lowest_layer_needs_only_ml_collections():
    for name in ("config", "registry"):
        roots = {found.split(".")[0] for found in imports(ROOT / "cb_vit" / f"{name}.py")}
        assert roots <= {"ml_collections", "cb_vit", *sys.stdlib_module_names}


def run(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_cb_vit_is_light_and_its_names_come_on_first_use():
    assert run("""
import sys, cb_vit
print(*(name for name in ("jax", "flax", "numpy", "tensorflow", "torch") if name in sys.modules))
print(*cb_vit.__all__)
assert set(cb_vit.__all__) <= set(dir(cb_vit))
assert cb_vit.broadcast_context.__module__ == "cb_vit.models.context"
assert "cb_vit.train" not in sys.modules
try:
    cb_vit.modle
except AttributeError as error:
    assert "'cb_vit' has no attribute 'modle'" in str(error)
from cb_vit import Model, train_and_evaluate
assert Model.__module__ == "cb_vit.models.vit" and train_and_evaluate.__module__ == "cb_vit.train"
""") == ["Model", "batches", "broadcast_context", "compare", "get_config", "load", "merge", "train_and_evaluate"]


def test_importing_everything_has_no_effects():
    paths = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules("cb_vit")]
    names = [path.removesuffix(".__init__") for path in paths]
    assert run(f"""
import importlib, logging, os, sys
before = dict(os.environ), list(sys.path), logging.root.level
for name in {names}:
    importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "an import started a JAX backend"
assert (dict(os.environ), list(sys.path), logging.root.level) == before
print(*({{"tensorflow", "torch"}} & set(sys.modules)))
""") == []
