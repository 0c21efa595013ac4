"""The offline bundle: made, installed where pip finds no index, and refused where it is not what was made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy/offline/bundle.py"
# Nobody listens there: a request to an index would fail.
NO_INDEX = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "0"}


def run(*command, env=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("offline") / "bundle"
    made = run(SCRIPT, "make", "--engine", "none", folder)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


@pytest.fixture
def carried(bundle, tmp_path) -> Path:
    """The bundle on another machine: a copy, with nothing of this repository beside it."""
    return Path(shutil.copytree(bundle, tmp_path / "carried"))


def test_a_bundle_installs_without_an_index(carried, tmp_path):
    done = run(carried / "bundle.py", "install", "--into", tmp_path / "env", env=NO_INDEX)
    assert done.returncode == 0, done.stdout + done.stderr
    code = (
        "from importlib.metadata import entry_points, version; print(version('moe-backend-plugin'), "
        "*(e.value for group in ('vllm.general_plugins', 'sglang.srt.plugins') for e in entry_points(group=group)))"
    )
    found = subprocess.run([tmp_path / "env/bin/python", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    from moe_backend_plugin import __version__

    assert found == [__version__, "moe_backend_plugin.engines.vllm:register", "moe_backend_plugin.engines.sglang:register"]
    assert (tmp_path / "env/bin/moe-backend").exists()


def test_every_wheel_is_listed_with_its_hash(bundle):
    lines = (bundle / "requirements.txt").read_text().splitlines()
    assert len(lines) == len(list((bundle / "wheels").iterdir())) == 1
    assert lines[0].startswith("moe_backend_plugin==") and "--hash=sha256:" in lines[0]


def test_an_altered_wheel_is_refused(carried, tmp_path):
    (wheel,) = (carried / "wheels").iterdir()
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    venv.create(tmp_path / "env", with_pip=True)
    done = run(carried / "bundle.py", "install", "--into", tmp_path / "env", env=NO_INDEX)
    assert done.returncode == 1 and "DO NOT MATCH THE HASHES" in done.stderr and "bundle: exit code 1 of: pip" in done.stderr


def test_another_python_is_refused(carried, tmp_path):
    made = json.loads((carried / "bundle.json").read_text())
    (carried / "bundle.json").write_text(json.dumps({**made, "python": "CPython 3.9"}))
    done = run(carried / "bundle.py", "install", "--into", tmp_path / "env")
    assert done.returncode == 1 and done.stderr.startswith("bundle: made for CPython 3.9; this is CPython 3.") and len(done.stderr) < 100
    assert not (tmp_path / "env").exists()


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    done = run(SCRIPT, "install", "--into", tmp_path / "env")
    assert done.returncode == 1 and done.stderr.startswith(f"bundle: {SCRIPT.parent} has no bundle.json: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "env").exists()


def test_a_full_folder_is_refused(tmp_path):
    (tmp_path / "old.txt").touch()
    done = run(SCRIPT, "make", "--engine", "sglang", tmp_path)
    assert done.returncode == 1 and done.stderr == f"bundle: {tmp_path} is not empty\n"


def test_engines_are_extras_of_the_package():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    done = run(SCRIPT, "make", "--engine", "tgi", "x")
    assert done.returncode == 2 and "invalid choice: 'tgi' (choose from 'vllm', 'sglang', 'none')" in done.stderr
    assert {"vllm", "sglang"} <= set(extras)
