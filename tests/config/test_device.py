"""The device query with a stand-in for NVML, and the choice of a provider."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moe_backend_plugin.config import PluginConfig
from moe_backend_plugin.device import LAYER_KINDS, LAYER_NAMES, Choice, Device, choose_provider, find_device
from moe_backend_plugin.errors import ConfigError, UnsupportedLayerError

CPU = Device("cpu", "some processor", 1 << 34)
H100 = Device("cuda", "NVIDIA H100", 80 << 30, (9, 0))
A100 = Device("cuda", "NVIDIA A100", 80 << 30, (8, 0))
B200 = Device("cuda", "NVIDIA B200", 180 << 30, (10, 0))
GPUS = [("GPU-aaaa-1", "NVIDIA H100", (9, 0)), ("GPU-bbbb-2", "NVIDIA B200", (10, 0)), ("GPU-cccc-3", "NVIDIA B300", (10, 3))]


class FakeNvml:
    """The few NVML calls that are used, over a list of GPUs."""

    class NVMLError(Exception):
        pass

    def __init__(self, gpus, works=True, has_memory=True):
        self.gpus, self.works, self.has_memory, self.open = gpus, works, has_memory, 0

    def nvmlInit(self):
        if not self.works:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        raise self.NVMLError("Not Found")

    def nvmlDeviceGetUUID(self, gpu):
        return gpu[0]

    def nvmlDeviceGetName(self, gpu):
        return gpu[1]

    def nvmlDeviceGetCudaComputeCapability(self, gpu):
        return gpu[2]

    def nvmlDeviceGetMemoryInfo(self, gpu):
        if not self.has_memory:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(total=80 << 30)


@pytest.fixture
def nvml(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(**options):
        fake = FakeNvml(**{"gpus": GPUS, **options})
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return install


@pytest.mark.parametrize(
    ("visible", "arch"),
    [(None, "sm90"), ("1", "sm100"), ("2,0", "sm103"), ("GPU-bbbb", "sm100"), ("", "cpu"), ("-1", "cpu"), ("9", "cpu"), ("MIG-x", "cpu")],
)
def test_first_visible_gpu(nvml, monkeypatch, visible, arch):
    fake = nvml()
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_device().arch == arch
    assert fake.open == 0


def test_device_facts(nvml):
    nvml()
    assert find_device() == H100
    assert find_device("cpu").kind == "cpu"
    nvml(has_memory=False)
    assert find_device().memory == 0


def test_no_gpu(nvml):
    nvml(works=False)
    assert find_device().kind == "cpu" and find_device().name and find_device().memory > 0
    forced = find_device("cuda")
    assert forced.arch == "cuda" and "Driver Not Loaded" in forced.note


def test_without_pynvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_device().kind == "cpu"
    assert "nvidia-ml-py" in find_device("cuda").note


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_cpu_uses_torch_ops(kind):
    choice = choose_provider(kind, CPU, PluginConfig(strict=True))
    assert choice.provider == "torch" and choice.missing == () and "cpu" in choice.reason


@pytest.mark.parametrize(("kind", "device"), [("linear", B200), ("linear", A100), ("moe", B200), ("moe", A100)])
def test_cuda_uses_the_engine_and_says_why(kind, device):
    choice = choose_provider(kind, device, PluginConfig())
    assert choice.provider == "engine" and device.arch in choice.reason
    assert choice.missing == (f"{LAYER_NAMES[kind]} kernel for {device.arch}",)


def test_dense_layers_on_hopper_are_the_engine_s_unless_asked():
    auto = choose_provider("linear", H100, PluginConfig())
    assert auto.provider == "engine" and auto.missing == () and "vLLM serves it with Humming or Marlin" in auto.reason
    assert "linear.provider: cutedsl would take this package's kernels" in auto.reason and "not been measured" in auto.reason
    asked = choose_provider("linear", H100, PluginConfig(linear={"provider": "cutedsl"}, strict=True))
    assert asked.provider == "cutedsl" and asked.missing == () and "not been measured" in asked.reason
    with pytest.raises(UnsupportedLayerError, match="auto takes no kernel .*strict: false .*linear.provider: engine or cutedsl"):
        choose_provider("linear", H100, PluginConfig(strict=True))


@pytest.mark.parametrize(("kind", "words"), [("moe", "serve NVFP4 MoE layers"), ("gdn", "serve gated-delta-net decode")])
@pytest.mark.parametrize("asked", ["auto", "cutedsl"])
def test_kernels_serve_hopper(kind, words, asked):
    choice = choose_provider(kind, H100, PluginConfig(**{kind: {"provider": asked}}, strict=True))
    assert choice.provider == "cutedsl" and choice.missing == ()
    assert ("sm90" in choice.reason and words in choice.reason) or asked == "cutedsl"


def test_gdn_kernels_serve_blackwell_only_when_asked():
    assert choose_provider("gdn", B200, PluginConfig()).provider == "engine"
    asked = choose_provider("gdn", B200, PluginConfig(gdn={"provider": "cutedsl"}))
    assert asked.provider == "cutedsl" and "have not been run" in asked.reason


@pytest.mark.parametrize(
    ("kind", "device", "words"),
    [
        ("gdn", CPU, "9.0, 10.0 or 10.3"),
        ("gdn", A100, "9.0, 10.0 or 10.3"),
        ("linear", CPU, "compute capability 9.0 "),
        ("linear", B200, "wgmma, which only Hopper has"),
        ("moe", CPU, "compute capability 9.0 "),
        ("moe", A100, "compute capability 9.0 "),
        ("moe", B200, "wgmma, which only Hopper has"),
    ],
)
def test_kernels_are_refused_where_they_do_not_run(kind, device, words):
    with pytest.raises(UnsupportedLayerError, match=f"model.layers.0: .*{kind}.provider: cutedsl on .*{words}.*, or auto"):
        choose_provider(kind, device, PluginConfig(**{kind: {"provider": "cutedsl"}}), where="model.layers.0")


@pytest.mark.parametrize("capability", [(10, 0), (10, 3)])
def test_flashinfer_serves_blackwell_only_when_asked_and_only_who_can_call_it(capability):
    device, asked = replace(B200, capability=capability), PluginConfig(moe={"provider": "cutedsl"}, strict=True)
    choice = choose_provider("moe", device, asked, drives_flashinfer=True)
    assert choice.provider == "flashinfer" and "never run by this package's authors" in choice.reason and choice.missing == ()
    auto = choose_provider("moe", device, PluginConfig(), drives_flashinfer=True)
    assert auto.provider == "engine" and "moe.provider: cutedsl would take FlashInfer's" in auto.reason
    assert "FlashInfer's" not in choose_provider("moe", device, PluginConfig()).reason
    for unable in ({}, {"drives_flashinfer": True}):
        with pytest.raises(UnsupportedLayerError, match="moe.provider: cutedsl"):
            choose_provider("moe", replace(device, capability=(10, 7)) if unable else device, asked, **unable)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("strict", [False, True])
def test_torch_is_refused_on_a_gpu(kind, strict):
    config = PluginConfig(**{kind: {"provider": "torch"}}, strict=strict)
    with pytest.raises(UnsupportedLayerError, match=rf"model.layers.0: .*{kind}.provider: torch on NVIDIA H100; allowed: auto or engine"):
        choose_provider(kind, H100, config, where="model.layers.0")
    assert choose_provider(kind, CPU, config).provider == "torch"


def test_engine_on_cpu_warns():
    choice = choose_provider("moe", CPU, PluginConfig(moe={"provider": "engine"}, strict=True))
    assert choice == Choice("engine", "moe.provider is engine; vLLM has no NVFP4 kernel for CPU and stops at start-up", ())


def test_strict_refuses_the_engine():
    with pytest.raises(UnsupportedLayerError, match=r"model.layers.0.mlp.experts: .*sm100.*strict: false"):
        choose_provider("moe", B200, PluginConfig(strict=True), where="model.layers.0.mlp.experts")


def test_unknown_layer_kind():
    with pytest.raises(ConfigError, match="attention"):
        choose_provider("attention", CPU, PluginConfig())
