"""The files of deploy/ say what the engine, the plugin and Kubernetes accept: each is read by the parser or schema that will read it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path, PurePosixPath

import helm_schemas
import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

from moe_backend_plugin.config import PluginConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(DEPLOY.glob("kubernetes/*.yaml"))
DOCKERFILES = sorted(DEPLOY.glob("docker/*.Dockerfile"))
VLLM_SERVERS = sorted(DEPLOY.glob("vllm-*.yaml"))
READ_ELSEWHERE = {
    *DEPLOY.glob("sglang-*.yaml"),  # by SGLang's parser, in integration/sglang_cpu/test_deploy.py
    DEPLOY / "moe-backend-plugin.yaml",  # by this package, in tests/config/test_config.py
}


def objects(file: Path) -> list[dict]:
    return list(yaml.safe_load_all(file.read_text()))


def of_kind(file: Path, kind: str) -> dict:
    return next(found for found in objects(file) if found["kind"] == kind)


def parsed(*arguments: str):
    """What vLLM's server makes of its arguments. SGLang's parser reads its files in integration/sglang_cpu."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args([*arguments])


def test_every_yaml_file_is_read_by_a_test():
    """A file that no list above names would be shipped unread."""
    values = {DEPLOY / "helm" / name for name in helm_schemas.CHARTS}
    found = {file for ending in ("yaml", "yml") for file in DEPLOY.rglob(f"*.{ending}")}
    assert found == {*MANIFESTS, *VLLM_SERVERS, *values, *READ_ELSEWHERE}


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
    for file in (*VLLM_SERVERS, tmp_path / "manifest.yaml"):
        arguments = parsed("serve", "--config", str(file))
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
    from_the_image = {"torch", "numpy", "safetensors", "pydantic", "pyyaml"}
    installed = {Requirement(text_) for text_ in re.findall(r'"([\w-]+>=[\d.]+)"', text)}
    assert {str(r) for r in wanted if r.marker is None and r.name.lower() not in from_the_image} == {str(r) for r in installed}


@pytest.mark.parametrize(
    ("engine", "command"),
    [("vllm", ["vllm", "serve", "--quantization", "nvfp4_cutedsl"]), ("sglang", ["sglang", "serve", "--moe-backend", "cutedsl"])],
)
def test_entry_points_start_the_engine_with_the_plugin(engine, command):
    entry = re.search(r"^ENTRYPOINT (.*)$", (DEPLOY / f"docker/{engine}.Dockerfile").read_text(), re.MULTILINE)
    assert json.loads(entry.group(1)) == command


# `sglang serve` looks for the model on its command line before it reads a file.
SGLANG_SERVE = ["sglang", "serve", "--model-path", "nvidia/Qwen3-30B-A3B-NVFP4", "--config"]


def test_sglang_serves_experts_and_gdn_on_the_plugin():
    """In every frame: of the chart's values :func:`test_values_start_what_the_manifests_start` says that they are the manifest's."""
    manifest = of_kind(DEPLOY / "kubernetes/sglang.yaml", "ConfigMap")["data"]["sglang.yaml"]
    for text in (manifest, (DEPLOY / "sglang-hopper.yaml").read_text()):
        settings = yaml.safe_load(text)
        assert (settings["moe-backend"], settings["linear-attn-decode-backend"]) == ("cutedsl", "cutedsl_plugin")


def on_a_volume(folder: str, volumes: Iterable[str]) -> bool:
    return any(PurePosixPath(folder).is_relative_to(volume) for volume in volumes)


def test_sglang_keeps_the_kernels_that_it_compiles():
    """By default they lie in a home folder, which a container loses; of the chart's values the test below says the same."""
    text = (DEPLOY / "docker/sglang.Dockerfile").read_text()
    (folder,) = re.findall(r"^ENV SGLANG_JIT_CACHE_DIR=(\S+)$", text, re.MULTILINE)
    assert on_a_volume(folder, re.findall(r"^VOLUME (\S+)$", text, re.MULTILINE))
    container = of_kind(DEPLOY / "kubernetes/sglang.yaml", "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "SGLANG_JIT_CACHE_DIR", "value": folder} in container["env"]
    assert on_a_volume(folder, [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "cache"])


def test_sglang_is_given_its_model_and_time_to_answer():
    """Its /health takes a second at least, which is Kubernetes' own limit."""
    container = of_kind(DEPLOY / "kubernetes/sglang.yaml", "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == [*SGLANG_SERVE, "/etc/sglang/sglang.yaml"]
    assert all(container[probe]["timeoutSeconds"] > 20 for probe in ("startupProbe", "readinessProbe", "livenessProbe"))


# --- Helm ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "schema"), helm_schemas.CHARTS.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_values_fit_their_chart(file, schema):
    values = yaml.safe_load((DEPLOY / "helm" / file).read_text())
    jsonschema.Draft202012Validator(schema).validate(values)
    unknown = copy.deepcopy(values)
    deepest(unknown)["no_such_value"] = 1
    assert not jsonschema.Draft202012Validator(schema).is_valid(unknown)


def deepest(values: dict) -> dict:
    """The object that describes the server, in either chart."""
    if "servingEngineSpec" in values:
        return values["servingEngineSpec"]["modelSpec"][0]
    return values["controllers"]["sglang"]["containers"]["server"]


def test_every_values_file_has_a_chart():
    assert {file.name for file in DEPLOY.glob("helm/*")} == set(helm_schemas.CHARTS)


def plugin_settings(text: str, tmp_path: Path, monkeypatch) -> PluginConfig:
    (tmp_path / "plugin.yaml").write_text(text)
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_CONFIG", str(tmp_path / "plugin.yaml"))
    return PluginConfig()


def test_production_stack_starts_vllm_with_the_plugin(tmp_path, monkeypatch):
    """Its objects are Kubernetes', what is mounted exists, and the command line that the chart writes is vLLM's."""
    values = yaml.safe_load((DEPLOY / "helm/vllm-production-stack.yaml").read_text())
    for found in values["extraObjects"]:
        kubernetes_validate.validate(found, "1.33", strict=True)
    made = {found["kind"]: found for found in values["extraObjects"]}
    (model,) = values["servingEngineSpec"]["modelSpec"]
    volumes, mounts = ({entry["name"]: entry for entry in model[key]} for key in ("extraVolumes", "extraVolumeMounts"))
    assert set(volumes) == set(mounts)
    assert volumes["plugin"]["configMap"]["name"] == made["ConfigMap"]["metadata"]["name"]
    assert volumes["kernels"]["persistentVolumeClaim"]["claimName"] == made["PersistentVolumeClaim"]["metadata"]["name"]
    assert model["env"] == [{"name": "MOE_BACKEND_PLUGIN_CONFIG", "value": f"{mounts['plugin']['mountPath']}/plugin.yaml"}]
    config = plugin_settings(made["ConfigMap"]["data"]["plugin.yaml"], tmp_path, monkeypatch)
    assert config.kernel_cache == mounts["kernels"]["mountPath"]
    vllm = model["vllmConfig"]
    flags = ("--dtype", vllm["dtype"], "--max-model-len", str(vllm["maxModelLen"]), "--max-num-seqs", str(vllm["maxNumSeqs"]))
    arguments = parsed(model["modelURL"], *flags, *vllm["extraArgs"])
    assert arguments.model_tag == model["modelURL"]
    assert (arguments.quantization, arguments.max_num_batched_tokens, arguments.shutdown_timeout) == ("nvfp4_cutedsl", 8192, 5)


def test_app_template_starts_sglang_with_the_plugin(tmp_path, monkeypatch):
    values = yaml.safe_load((DEPLOY / "helm/sglang-app-template.yaml").read_text())
    server, files = values["controllers"]["sglang"]["containers"]["server"], values["configMaps"]["config"]["data"]
    mounted = {mount["path"] for volume in values["persistence"].values() for mount in volume["globalMounts"]}
    folder = values["persistence"]["config"]["globalMounts"][0]["path"]
    assert server["command"] == [*SGLANG_SERVE, f"{folder}/sglang.yaml"]
    kept = {name: server["env"].pop(name) for name in ("HF_HOME", "SGLANG_JIT_CACHE_DIR")}
    assert server["env"] == {"MOE_BACKEND_PLUGIN_CONFIG": f"{folder}/plugin.yaml"}
    cache = [mount["path"] for mount in values["persistence"]["cache"]["globalMounts"]]
    assert set(files) == {"sglang.yaml", "plugin.yaml"} and all(on_a_volume(path, cache) for path in kept.values())
    assert plugin_settings(files["plugin.yaml"], tmp_path, monkeypatch).kernel_cache in mounted
    port = yaml.safe_load(files["sglang.yaml"])["port"]
    assert values["service"]["sglang"]["ports"]["http"]["port"] == port
    for probe in server["probes"].values():
        assert probe["spec"]["httpGet"]["port"] == port and probe["spec"]["timeoutSeconds"] > 20


def test_values_start_what_the_manifests_start():
    """The same model, the same settings; only the frame differs."""
    stack, template = (yaml.safe_load((DEPLOY / "helm" / name).read_text()) for name in helm_schemas.CHARTS)
    manifests = {engine: of_kind(DEPLOY / f"kubernetes/{engine}.yaml", "ConfigMap")["data"] for engine in ("vllm", "sglang")}
    assert template["configMaps"]["config"]["data"] == manifests["sglang"]
    assert stack["extraObjects"][0]["data"]["plugin.yaml"] == manifests["vllm"]["plugin.yaml"] == manifests["sglang"]["plugin.yaml"]
    (model,) = stack["servingEngineSpec"]["modelSpec"]
    server = yaml.safe_load(manifests["vllm"]["vllm.yaml"])
    assert [model["modelURL"], model["vllmConfig"]["maxModelLen"], model["vllmConfig"]["maxNumSeqs"]] == [
        server["model"],
        server["max-model-len"],
        server["max-num-seqs"],
    ]
