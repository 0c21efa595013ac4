"""The files of deploy/ say what the engine, the plugin and Kubernetes accept: each is read by the parser or schema that will read it."""

from __future__ import annotations

import json
import re
from importlib.metadata import requires
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

from moe_backend_plugin.config import PluginConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(DEPLOY.glob("kubernetes/*.yaml"))
DOCKERFILES = sorted(DEPLOY.glob("docker/*.Dockerfile"))


def objects(file: Path) -> list[dict]:
    return list(yaml.safe_load_all(file.read_text()))


def of_kind(file: Path, kind: str) -> dict:
    return next(found for found in objects(file) if found["kind"] == kind)


def serve_arguments(file: Path):
    """What ``vllm serve --config FILE`` makes of a file."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(["serve", "--config", str(file)])


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda file: file.name)
def test_manifests_fit_kubernetes_schemas(manifest):
    for found in objects(manifest):
        kubernetes_validate.validate(found, "1.33", strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda file: file.name)
def test_manifests_name_what_they_define(manifest):
    pod = of_kind(manifest, "Deployment")["spec"]["template"]
    container = pod["spec"]["containers"][0]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["config"]["configMap"]["name"] == of_kind(manifest, "ConfigMap")["metadata"]["name"]
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == of_kind(manifest, "PersistentVolumeClaim")["metadata"]["name"]
    assert of_kind(manifest, "Service")["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    mounted = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "config")
    files = {f"{mounted}/{name}" for name in of_kind(manifest, "ConfigMap")["data"]}
    assert {value for value in container["command"] if value.endswith(".yaml")} <= files
    assert next(entry["value"] for entry in container["env"] if entry["name"] == "MOE_BACKEND_PLUGIN_CONFIG") in files


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda file: file.name)
def test_the_plugins_file_in_a_manifest_is_one(manifest, tmp_path, monkeypatch):
    data = of_kind(manifest, "ConfigMap")["data"]
    (tmp_path / "plugin.yaml").write_text(data["plugin.yaml"])
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_CONFIG", str(tmp_path / "plugin.yaml"))
    kernel_cache = PluginConfig().kernel_cache
    mounts = of_kind(manifest, "Deployment")["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert kernel_cache in {mount["mountPath"] for mount in mounts}


def test_vllm_reads_its_configurations(tmp_path):
    (tmp_path / "manifest.yaml").write_text(of_kind(DEPLOY / "kubernetes/vllm.yaml", "ConfigMap")["data"]["vllm.yaml"])
    for file in (DEPLOY / "vllm-cpu.yaml", DEPLOY / "vllm-hopper.yaml", tmp_path / "manifest.yaml"):
        arguments = serve_arguments(file)
        written = yaml.safe_load(file.read_text())
        assert arguments.quantization == "nvfp4_cutedsl"
        for name, value in written.items():
            assert getattr(arguments, name.replace("-", "_"), value) in (value, [value]), (file.name, name)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.name)
def test_images_have_what_the_package_needs(dockerfile):
    """The base image brings the engine, torch and the compiler; what else the package requires is installed by name."""
    text = dockerfile.read_text()
    engine, version = re.search(r"ARG (\w+)_VERSION=v?([\d.]+)", text).groups()
    wanted = [Requirement(line) for line in requires("moe-backend-plugin")]
    supported = next(r for r in wanted if r.name == engine.lower() and r.marker and f'extra == "{engine.lower()}"' in str(r.marker))
    assert supported.specifier.contains(version)
    from_the_image = {"torch", "safetensors", "pydantic", "pyyaml"}
    installed = {Requirement(text_) for text_ in re.findall(r'"([\w-]+>=[\d.]+)"', text)}
    assert {str(r) for r in wanted if r.marker is None and r.name.lower() not in from_the_image} == {str(r) for r in installed}


def test_entry_points_start_the_engine_with_the_plugin():
    entry = re.search(r"^ENTRYPOINT (.*)$", (DEPLOY / "docker/vllm.Dockerfile").read_text(), re.MULTILINE)
    assert json.loads(entry.group(1)) == ["vllm", "serve", "--quantization", "nvfp4_cutedsl"]
