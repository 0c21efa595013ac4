"""FlashInfer's kernels through the Blackwell provider, on such a GPU: every tactic, in graphs too. Nobody has run this yet."""

from __future__ import annotations

import pytest
import torch

from moe_backend_plugin.device import FLASHINFER
from moe_backend_plugin.moe import blackwell, kernel_check
from moe_backend_plugin.moe.problem import MoEProblem

if not torch.cuda.is_available() or torch.cuda.get_device_capability() not in FLASHINFER:
    pytest.skip("Blackwell provider: NOTHING OF IT RAN, no GPU of compute capability 10.0 or 10.3", allow_module_level=True)
if reason := blackwell.missing():
    pytest.skip(f"Blackwell provider: NOTHING OF IT RAN, {reason}", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
ACTIVATIONS = kernel_check.ACTIVATIONS


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.kind} {a.limit}")
@pytest.mark.parametrize("scales", ["static", "token"])
def test_every_tactic_is_right(activation, scales):
    problem = MoEProblem(8, 8, 512, 256, 2, activation, "nvfp4")
    wrong = [row for row in kernel_check.blackwell_rows(problem, DEVICE, scales=(scales,)) if row.reason]
    assert not wrong, wrong


@pytest.mark.parametrize("tokens", [1, 64, 1025, 4096])
def test_deepseek_v3_on_one_of_sixteen_ranks(tokens):
    problem = MoEProblem(16, 16, 7168, 2048, 8, activation_precision="nvfp4")
    wrong = [row for row in kernel_check.blackwell_rows(problem, DEVICE, tokens=(tokens,)) if row.reason]
    assert not wrong, wrong


@pytest.mark.parametrize(
    "tactic", [blackwell.Tactic(), blackwell.Tactic(256, 256, 256), blackwell.Tactic(ordered=True)], ids=lambda t: t.name
)
@pytest.mark.parametrize("scales", ["static", "token"])
def test_a_graph_zeroes_its_output_beside_the_first_projection(tactic, scales):
    problem = MoEProblem(8, 8, 512, 256, 2, activation_precision="nvfp4")
    made = kernel_check.layer(problem, 40, DEVICE)
    weights = blackwell.pack(problem, *made.weights, *(made.input_scales if scales == "static" else ()))
    blackwell.prepare(problem, torch.bfloat16, DEVICE, 64, scales)
    right = made.right(by_token=scales == "token", exact=scales == "static")
    out = torch.empty_like(made.x)

    def call() -> None:
        blackwell.fused_moe(made.x, weights, made.topk_weights, made.topk_ids, problem, out, tactic=tactic)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        call()
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        reason, *_ = kernel_check.compare(out, right, kernel_check.W4A4)
        assert reason is None, reason
