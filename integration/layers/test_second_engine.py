"""A process that has had an engine can have another, with other settings, and then the first again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[1] / "models" / "pycoder-moe-nvfp4"


@pytest.mark.timeout(1800)
def test_engines_one_after_another(vllm_config):
    script = Path(__file__).with_name("second_engine.py")
    done = subprocess.run([sys.executable, str(script), str(MODEL)], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    first, second, third = json.loads(done.stdout.strip().splitlines()[-1])["texts"]
    assert first == third and all(first)
    # Rounded activations: the second engine read its own settings.
    assert second != first
