"""What `pip install` puts on a machine: all of the package, its experiments, and the command."""
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT, records


def run(*args, cwd, **env):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(list(map(str, args)), cwd=cwd, text=True, capture_output=True, timeout=120,
                            env=clean | {"JAX_PLATFORMS": "cpu"} | env)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel is installed in, and the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    for name in ("cb_vit", "configs"):  # a copy: setuptools builds beside what it builds from
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", ".", "./source", cwd=folder)
    wheel, = folder.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", "site", wheel, cwd=folder)
    return folder / "site", wheel


def test_the_wheel_has_every_module_and_every_config(installed):
    names = {name for name in zipfile.ZipFile(installed[1]).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "cb_vit").rglob("*.py")}
    configs = {f"cb_vit/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert names == modules | configs | {f"cb_vit/datasets/{name}.txt" for name in ("imagenet", "objectnet")}


def test_it_trains_and_evaluates_by_name_from_any_folder(installed, tmp_path):
    site, _ = installed
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "common.py").write_text("raise ValueError('of the user')\n")
    command = site / "bin" / "cb-vit"
    said = run(command, "train", "--config=debug:size=8", "--workdir=run", "--config.total_steps=2",
               "--config.plot=False", cwd=tmp_path, PYTHONPATH=str(site))
    assert records(tmp_path / "run")[-1]["step"] == 2
    *_, following = said.splitlines()
    assert following.split(maxsplit=1) == ["next", "cb-vit eval --workdir=run"]
    said = run(command, *following.split()[2:], cwd=tmp_path, PYTHONPATH=str(site))
    assert f"val/loss                {records(tmp_path / 'run')[-1]['val/loss']:.4f}" in said
