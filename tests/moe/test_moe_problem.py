import ast
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.moe.problem import ACTIVATION_NAMES, Activation, MoEProblem


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("silu",), Activation("silu")),
        (("swiglu", None, None, 0.0), Activation("silu")),
        (("silu", 1.0, 0.0, 10.0), Activation("silu", limit=10.0)),
        (("swigluoai",), Activation("swigluoai", 1.702, 1.0, 7.0)),
        (("swigluoai", 1.5, 0.5, 6.0), Activation("swigluoai", 1.5, 0.5, 6.0)),
        (("swigluoai_uninterleave", None, None, 7), Activation("swigluoai", 1.0, 0.0, 7.0)),
        (("swigluoai_uninterleave", 1.702, 1.0, 7.0), Activation("swigluoai", 1.702, 1.0, 7.0)),
        (("relu2_no_mul",), Activation("relu2")),
        (("relu2",), Activation("relu2")),
    ],
)
def test_parse(arguments, expected):
    assert Activation.parse(*arguments) == expected


@pytest.mark.parametrize("name", ["gelu", "swiglustep", "situ", "", "SILU"])
def test_parse_lists_the_allowed_names(name):
    with pytest.raises(ValueError) as error:
        Activation.parse(name)
    assert repr(name) in str(error.value)
    assert all(allowed in str(error.value) for allowed in ACTIVATION_NAMES)


@pytest.mark.parametrize(
    "arguments",
    [
        ("silu", 1.702),
        ("silu", None, 1.0),
        ("silu", None, None, -1.0),
        ("swigluoai_uninterleave",),
        ("relu2", None, None, 7.0),
        ("swigluoai", math.nan),
    ],
)
def test_parse_refuses_parameters_that_do_not_fit(arguments):
    with pytest.raises(PluginError):
        Activation.parse(*arguments)


def test_gated():
    assert Activation("silu").gated and Activation("swigluoai").gated and not Activation("relu2").gated


@pytest.mark.parametrize("activation", [Activation(), Activation("silu", limit=1.0), Activation("swigluoai", 1.702, 1.0, 7.0)])
def test_nan_passes_through(activation):
    h = torch.randn(4, 32)
    h[1, 3] = math.nan
    h[2, 16 + 3] = math.nan
    nan = activation.apply(h).isnan()
    assert nan.sum() == 2 and nan[1, 3] and nan[2, 3]


@pytest.mark.parametrize("change", [{"hidden": 24}, {"intermediate": 0}, {"num_local_experts": 9}, {"num_local_experts": 0}, {"top_k": 0}])
def test_problem_refuses_impossible_sizes(change):
    sizes = {"num_experts": 8, "num_local_experts": 8, "hidden": 64, "intermediate": 32, "top_k": 2} | change
    with pytest.raises(PluginError, match=next(iter(change))):
        MoEProblem(**sizes)


def test_rows_of_the_first_projection():
    assert MoEProblem(8, 8, 64, 32, 2).w13_rows == 64
    assert MoEProblem(8, 8, 64, 32, 2, Activation("relu2")).w13_rows == 32


def test_names_are_those_of_vllm():
    """Where vLLM is installed; its source is read, not imported, which would take longer than all tests here."""
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        pytest.skip("no vLLM here")
    source = Path(spec.origin).parent / "model_executor" / "layers" / "fused_moe" / "activation.py"
    enum = next(n for n in ast.parse(source.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "MoEActivation")
    names = {n.value.value for n in enum.body if isinstance(n, ast.Assign)}
    assert {"silu", "swigluoai", "swigluoai_uninterleave", "relu2", "relu2_no_mul"} <= names
    for name in names - set(ACTIVATION_NAMES):
        with pytest.raises(PluginError):
            Activation.parse(name)


@pytest.mark.parametrize(
    "activation",
    [Activation(), Activation("silu", limit=1.0), Activation("swigluoai", 1.702, 1.0, 7.0), Activation("swigluoai", 1.5, 0.5, 0.7)],
)
def test_formula(activation):
    gate, up = torch.randn(2, 5, 16, dtype=torch.float64) * 3
    g, u = gate, up
    if activation.limit:
        g, u = (
            torch.minimum(gate, torch.tensor(activation.limit)),
            torch.maximum(torch.minimum(up, torch.tensor(activation.limit)), torch.tensor(-activation.limit)),
        )
    want = g / (1 + torch.exp(-activation.alpha * g)) * (u + activation.beta)
    torch.testing.assert_close(activation.apply(torch.cat((gate, up), -1).float()), want.float(), rtol=1e-5, atol=1e-6)
