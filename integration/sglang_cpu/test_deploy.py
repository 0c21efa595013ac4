"""The configuration files of deploy/ that SGLang reads, read by SGLang: ``sglang serve --config FILE``."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def in_the_manifest() -> str:
    objects = yaml.safe_load_all((DEPLOY / "kubernetes/sglang.yaml").read_text())
    return next(found["data"]["sglang.yaml"] for found in objects if found["kind"] == "ConfigMap")


def in_the_chart() -> str:
    return yaml.safe_load((DEPLOY / "helm/sglang-app-template.yaml").read_text())["configMaps"]["config"]["data"]["sglang.yaml"]


# Every one: tests/deploy takes these names for read.
BESIDE_THEM = sorted(DEPLOY.glob("sglang-*.yaml"))
SOURCES = [*(pytest.param(file.read_text, id=file.name) for file in BESIDE_THEM), in_the_manifest, in_the_chart]


@pytest.mark.parametrize("source", SOURCES)
def test_sglang_reads_its_configurations(sglang, tmp_path, source):
    """Every value arrives under its own name, the alias under the name it stands for."""
    file = tmp_path / "sglang.yaml"
    file.write_text(source())
    arguments = sglang.prepare_server_args(["--model-path", "m", "--config", str(file)])
    written = yaml.safe_load(source())
    assert written["moe-backend"] == arguments.moe_runner_backend == "cutedsl"
    assert arguments.linear_attn_decode_backend == "cutedsl_plugin"
    found = {name: getattr(arguments, name.replace("-", "_")) for name in written if name != "moe-backend"}
    assert found == {name: value for name, value in written.items() if name != "moe-backend"}


def test_a_misspelt_setting_is_refused(sglang, tmp_path, capsys):
    file = tmp_path / "sglang.yaml"
    file.write_text(BESIDE_THEM[0].read_text() + "moe-bakend: cutedsl\n")
    with pytest.raises(SystemExit):
        sglang.prepare_server_args(["--model-path", "m", "--config", str(file)])
    assert "moe-bakend" in capsys.readouterr().err


def test_the_images_entry_point_is_accepted(sglang):
    import json
    import re

    text = (DEPLOY / "docker/sglang.Dockerfile").read_text()
    program, command, *flags = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1])
    assert (program, command) == ("sglang", "serve")
    arguments = sglang.prepare_server_args([*flags, "--model-path", "m"])
    assert (arguments.moe_runner_backend, arguments.model_path) == ("cutedsl", "m")
