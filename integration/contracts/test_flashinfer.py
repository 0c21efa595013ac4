"""The contract of the Blackwell provider with FlashInfer 0.7.0 and 0.7.2, without a GPU and without installing it.

NOTHING HERE RUNS ON A BLACKWELL GPU. What is held: every name and call fits both releases; the layouts are what FlashInfer's own
converters make, bit for bit; buffers have the sizes of its own helpers; its tactics and its word on what they can do are ours; and its
kernels compile for sm_100a as we ask for them. What the kernels compute is tested by ``moe-backend verify --kernels`` on such a machine.
"""

from __future__ import annotations

import ast
import itertools
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_backend_plugin.moe import blackwell
from moe_backend_plugin.moe.problem import Activation, MoEProblem
from moe_backend_plugin.nvfp4 import blackwell as layout

from .checks import PLUGIN, check_texts, check_value, drift, per
from .flashinfer_contract import (
    ENGINE,
    FIRST,
    MOE,
    RELEASES,
    SECOND,
    STAGES,
    TEXTS,
    UP_FIRST,
    VALUES,
    importable,
    run_from_text,
    unpack,
)
from .source import Drift, Function
from .usage import Plugin
from .wheels import Release, archive

sys.path.insert(0, str(PLUGIN.parent / "tests" / "moe"))
from flashinfer_emulation import Emulation  # noqa: E402

# The first test of a release may download its wheel.
pytestmark = [pytest.mark.timeout(1500), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

releases = pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.version)
scanned = Plugin(PLUGIN / "moe", ENGINE).uses()
DEEPSEEK = MoEProblem(256, 32, 7168, 2048, 8, Activation(), "nvfp4")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# --- names and calls --------------------------------------------------------------------------------------------------


@per("use", scanned)
@releases
def test_symbol(source_of, release: Release, use):
    try:
        source_of(release).check(use.symbol, use.call)
    except Drift as error:
        drift(error, use.where)


def test_the_scan_sees_the_provider():
    assert set(STAGES.values()) <= {use.symbol for use in scanned}


@per("symbol", VALUES)
@releases
def test_value(source_of, release: Release, symbol: str):
    check_value(source_of(release), release, symbol, VALUES[symbol])


@per("symbol", TEXTS)
@releases
def test_text(source_of, release: Release, symbol: str):
    check_texts(source_of(release), release, symbol, TEXTS[symbol])


@pytest.fixture(scope="module")
def calls() -> list[tuple[str, tuple, dict]]:
    """Every call of every stage, in every way that the provider makes them."""
    emulation = Emulation()
    for activation in (Activation(), Activation("swigluoai", 1.702, 1.0, 7.0), Activation("relu2")):
        problem = MoEProblem(4, 4, 256, 64, 2, activation, "nvfp4")
        generator = torch.Generator().manual_seed(0)

        def projection(rows: int, columns: int, generator=generator):
            codes = torch.randint(0, 256, (4, rows, columns // 2), dtype=torch.uint8, generator=generator)
            return codes, torch.ones(4, rows, columns // 16).to(torch.float8_e4m3fn)

        halves = 2 if activation.gated else 1
        tensors = (*projection(problem.w13_rows, 256), torch.ones(4, halves), *projection(256, 64), torch.ones(4))
        x, chosen = torch.randn(3, 256, generator=generator).bfloat16(), torch.full((3, 2), 0.5)
        ids = torch.tensor([[0, 1], [2, 3], [1, 2]], dtype=torch.int32)
        for scales in ((torch.ones(4), torch.ones(4)), ()):
            weights = blackwell.pack(problem, *tensors, *scales)
            for tactic in (blackwell.Tactic(), blackwell.Tactic(256, ordered=True)):
                blackwell.fused_moe(*(x, weights, chosen, ids, problem, torch.empty_like(x)), tactic=tactic, flashinfer=emulation.library())
    return emulation.calls


@per("stage", STAGES)
@releases
def test_every_call_fits_the_real_signature(source_of, release: Release, calls, stage: str):
    source = source_of(release)
    found = source.resolve(STAGES[stage])
    assert isinstance(found, Function)
    signature, made = source.signature(found), [call for call in calls if call[0] == stage]
    assert made and signature is not None
    for _, args, kwargs in made:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            drift(f"{STAGES[stage]}: {release} cannot be called so: {error}")


# --- layouts ----------------------------------------------------------------------------------------------------------


def checkpoint(experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, generator=generator)
    return codes, torch.randint(1, 127, (experts, rows, columns // 16), dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(("experts", "width", "hidden"), [(3, 64, 256), (2, 192, 512), (1, 768, 2048)])
@releases
def test_layouts_are_those_of_the_releases_own_converters(source_of, release: Release, experts: int, width: int, hidden: int):
    source = source_of(release)
    interleave = run_from_text(source, "flashinfer.fused_moe.prepare._interleave_linear_and_gate", torch=torch)
    unswizzle = run_from_text(source, "flashinfer.gemm.gemm_bf16_fp4._unswizzle_sf_128x4", torch=torch)
    to_view = run_from_text(source, "flashinfer.cute_dsl.utils.convert_sf_to_mma_layout", ceil_div=ceil_div)

    codes, scale = checkpoint(experts, 2 * width, hidden)
    packed, tiled = layout.pack_first(codes, scale, gated=True)
    # The converter interleaves its halves in the order given, and the kernel wants up first.
    halves = (torch.cat((t[:, width:], t[:, :width]), 1) for t in (codes, scale.view(torch.uint8)))
    expected, expected_scale = (interleave(t, group_size=64, dim=1) for t in halves)
    assert torch.equal(packed, expected)
    second, second_tiled = layout.pack_second(*checkpoint(experts, hidden, width), gated=True)
    assert torch.equal(second, checkpoint(experts, hidden, width)[0])
    for found, plain in ((tiled, expected_scale), (second_tiled, checkpoint(experts, hidden, width)[1].view(torch.uint8))):
        rows, groups = plain.shape[1:]
        for expert in range(experts):
            assert torch.equal(unswizzle(found[expert], rows, groups), plain[expert])
        theirs = to_view(found.view(-1, groups), m=rows, k=groups * 16, num_groups=experts)
        ours = layout.scale_view(found)
        assert ours.data_ptr() == theirs.data_ptr() and ours.stride() == theirs.stride() and ours.shape == theirs.shape


@releases
def test_up_comes_first(source_of, release: Release):
    module = source_of(release).module(f"{MOE}.blackwell.{FIRST}")
    assert module is not None and any(
        UP_FIRST in str(getattr(node, "value", "")) for tree in module.tree.body for node in ast.walk(tree)
    ), f"{release}: the first projection's kernel says otherwise than {UP_FIRST!r}"


# --- sizes ------------------------------------------------------------------------------------------------------------


@releases
def test_buffers_have_the_sizes_of_the_releases_own_helpers(source_of, release: Release):
    source = source_of(release)
    tiles = run_from_text(source, f"{MOE}.moe_utils.get_max_num_tiles")
    rows = run_from_text(source, f"{MOE}.moe_utils.get_max_num_permuted_tokens", get_max_num_tiles=tiles)
    buffers = run_from_text(
        source, f"{MOE}.moe_utils.allocate_moe_sort_buffers", torch=torch, get_max_num_tiles=tiles, get_max_num_permuted_tokens=rows
    )
    names = {
        "tile_expert": "out_tile_idx_to_expert_idx",
        "tile_limit": "out_tile_idx_to_mn_limit",
        "position": "out_expanded_idx_to_permuted_idx",
        "order": "out_permuted_idx_to_expanded_idx",
        "rows": "out_total_num_padded_tokens",
        "tiles": "out_num_non_exiting_tiles",
    }

    @given(st.integers(1, 16384), st.integers(1, 512), st.integers(1, 22), st.sampled_from([128, 256]))
    @settings(max_examples=300, deadline=None)
    def holds(tokens: int, local: int, top_k: int, tile: int) -> None:
        problem = replace(DEEPSEEK, num_experts=512, num_local_experts=local, top_k=top_k)
        plan = blackwell.plan(problem, tokens, blackwell.Tactic(tile), "static")
        assert plan["tile_expert"].shape == (tiles(tokens, top_k, local, tile),)
        assert plan["h"].shape == (rows(tokens, top_k, local, tile), 1024)
        theirs = buffers(tokens, 512, top_k, local, tile, device="meta")
        assert set(theirs) == set(names.values())
        for ours, their in names.items():
            assert plan[ours].shape == tuple(theirs[their].shape) and plan[ours].dtype is theirs[their].dtype

    holds()


# --- tactics and kernels ----------------------------------------------------------------------------------------------


def as_theirs(tactic: blackwell.Tactic) -> tuple:
    """FlashInfer's tuple for a tactic."""
    tile = tactic.tile_tokens
    first = ((tile, tactic.gate_up_columns), (tile // 128, 1), False)
    return tile, first, ((tile, tactic.down_columns), (tile // 128, tactic.down_cluster), False)


@releases
def test_tactics_are_the_releases_own(source_of, release: Release):
    source, names = source_of(release), {"itertools": itertools}
    tuner = f"{MOE}.tuner"
    for name in ("get_blackwell_gemm1_valid_tactics", "get_blackwell_gemm2_valid_tactics", "VALID_TILE_SIZES"):
        names[name] = run_from_text(source, f"{tuner}.{name}", **names)
    theirs = run_from_text(source, f"{tuner}.get_blackwell_moe_valid_tactics", **names)()
    assert {as_theirs(tactic) for tactic in blackwell.every(DEEPSEEK)} == set(theirs)


@pytest.fixture(scope="module")
def folder(source_of, tmp_path_factory):
    """The kernels' modules of a release, as files."""
    pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl, the kernels' compiler, is not installed")

    def get(release: Release) -> Path:
        source_of(release)  # says why there is none
        return unpack(archive(release), tmp_path_factory.mktemp(f"flashinfer{release.version}"))

    return get


def kernel_classes() -> tuple:
    first = import_module(f"{MOE}.blackwell.{FIRST}").BlockScaledContiguousGatherGroupedGemmKernel
    return first, import_module(f"{MOE}.blackwell.{SECOND}").Sm100BlockScaledContiguousGroupedGemmFinalizeFusionKernel


@releases
def test_the_kernels_can_do_what_we_call_valid(folder, release: Release):
    with importable(folder(release)):
        import cutlass

        first, second = kernel_classes()
        fp4, e4m3, bf16 = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.BFloat16
        majors = {"a_major": "k", "b_major": "k"}
        for width in (64, 192, 256, 768, 1408, 2048):
            for activation in (Activation(), Activation("relu2")):
                problem = replace(DEEPSEEK, intermediate=width, activation=activation)
                rows, columns = blackwell.first_rows(problem), blackwell.width(problem)
                for tactic in blackwell.every(DEEPSEEK):
                    tile, (tiler1, cluster1, _), (tiler2, cluster2, _) = as_theirs(tactic)
                    for c_dtype in (fp4, bf16):
                        can = first.can_implement(
                            *(fp4, fp4, e4m3, 16, c_dtype, tiler1, cluster1, tile * 8, rows, 7168, 32), **majors, c_major="n"
                        ) and second.can_implement(
                            *(fp4, fp4, e4m3, 16, bf16, cutlass.Float32, tiler2, cluster2, tile * 8, 7168, columns, 32),
                            **majors,
                            out_major="n",
                        )
                        assert can == (blackwell.validity(problem, tactic) is None), (width, activation.kind, tactic)


@pytest.mark.parametrize(
    ("tactic", "by_token"),
    [(blackwell.Tactic(), False), (blackwell.Tactic(256, 256, 256, 1), False), (blackwell.Tactic(256, 128, 128, 2, True), True)],
    ids=lambda value: value.name if isinstance(value, blackwell.Tactic) else ("token" if value else "static"),
)
@releases
def test_kernels_compile_for_sm_100a(folder, release: Release, tmp_path: Path, tactic: blackwell.Tactic, by_token: bool):
    """Both projections of a DeepSeek-V3 layer on one of eight ranks; each leaves one cubin for sm_100a."""
    with importable(folder(release)):
        import cuda.bindings.driver as driver
        import cutlass
        import cutlass.cute as cute
        from cutlass.cute.runtime import make_ptr

        first, second = kernel_classes()
        fp4, e4m3, f32, i32, bf16 = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.Float32, cutlass.Int32, cutlass.BFloat16

        def pointer(kind, align=16):
            return make_ptr(kind, 1 << 16, cute.AddressSpace.gmem, assumed_align=align)

        tile, (tiler1, cluster1, raster1), (tiler2, cluster2, raster2) = as_theirs(tactic)
        rows, columns, tokens = blackwell.first_rows(DEEPSEEK), blackwell.width(DEEPSEEK), 64
        sorted_rows = blackwell.max_tiles(tokens * 8, 32, tile) * tile
        token_scale = pointer(f32, 4) if by_token else None
        shared = {"tile_size": tile, "scaling_vector_size": 16, "stream": driver.CUstream(0)}
        maps = [pointer(i32, 4) for _ in range(4)]
        operands = [pointer(fp4, 32), pointer(fp4, 32), pointer(e4m3), pointer(e4m3)]

        def compiled(function, name: str, *arguments, **more) -> None:
            into = tmp_path / name
            into.mkdir()
            cute.compile(function, *arguments, **shared, **more, options=f"--gpu-arch sm_100a --keep-cubin --dump-dir {into}")
            (cubin,) = into.glob("*.cubin")
            assert b"sm_100a" in cubin.read_bytes()

        kernel = first(
            sf_vec_size=16,
            mma_tiler_mn=tiler1,
            cluster_shape_mn=cluster1,
            vectorized_f32=True,
            topk=8,
            raster_along_m=raster1,
            enable_pdl=True,
            use_a_per_token_scale=by_token,
        )
        compiled(
            kernel.wrapper,
            "first",
            *operands,
            pointer(bf16 if by_token else fp4, 32),
            None if by_token else pointer(e4m3),
            pointer(f32, 4),
            *maps,
            None if by_token else pointer(f32, 4),
            token_scale,
            *(tokens, sorted_rows, rows, 7168, 32),
            max_active_clusters=148 // cluster1[0],
        )
        kernel = second(
            sf_vec_size=16,
            mma_tiler_mn=tiler2,
            cluster_shape_mn=cluster2,
            raster_along_m=raster2,
            enable_pdl=True,
            use_a_per_token_scale=by_token,
            use_fused_finalize=not tactic.ordered,
        )
        compiled(
            kernel.wrapper,
            "second",
            *operands,
            pointer(bf16, 32),
            pointer(f32, 4),
            *maps,
            pointer(f32),
            token_scale,
            *(sorted_rows, 7168, columns, 32, tokens, 8),
            max_active_clusters=148 // (cluster2[0] * cluster2[1]),
        )
