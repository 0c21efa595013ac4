"""What the Blackwell provider uses of FlashInfer, the releases that must have it, and ways to run parts of them without a GPU.

FlashInfer is neither installed nor imported as a package: it is read as sources (:mod:`.source`), single functions of it are run from
their text, and its kernel modules are imported from those sources with the rest of the package left out.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .source import Function, Source, Value
from .wheels import Release

RELEASES = (Release("flashinfer-python", "0.7.0", "flashinfer"), Release("flashinfer-python", "0.7.2", "flashinfer"))
ENGINE = "flashinfer"

MOE = "flashinfer.fused_moe.cute_dsl"
FIRST = "blockscaled_contiguous_gather_grouped_gemm_act_fusion"
SECOND = "blockscaled_contiguous_grouped_gemm_finalize_fusion"
QUANTIZE = "flashinfer.quantization.kernels.nvfp4_quantize"

STAGES = {
    # Stage of ``moe.blackwell.Library`` -> the function that a call of it reaches.
    "quantize": "flashinfer.fp4_quantize",
    "quantize_by_token": f"{QUANTIZE}.nvfp4_quantize_per_token_cute_dsl",
    "sort": f"{MOE}.moe_utils.moe_sort",
    "first": f"{MOE}.{FIRST}.{FIRST}",
    "second": f"{MOE}.{SECOND}.{SECOND}",
    "zero": f"{MOE}.moe_utils.moe_output_memset_inplace",
    "combine": f"{MOE}.moe_utils.moe_unpermute",
}

VALUES: dict[str, object] = {f"{QUANTIZE}.SF_LAYOUT_LINEAR": 2, f"{QUANTIZE}.SF_LAYOUT_128x4": 0}

TEXTS: dict[str, tuple[str, ...]] = {
    # Who is local is told by a range of ids; the output has to be zeroed for the fused second projection alone.
    f"{MOE}.{SECOND}.{SECOND}": ("allocator = torch.zeros if use_fused_finalize else torch.empty", "major != 10"),
    # What the first projection takes for the output's own rounding, and in which tile a row of gate meets its row of up.
    f"{MOE}.{FIRST}.{FIRST}": ("global_scale is required when c_dtype is 'float4_e2m1fn'", "n % 128 != 0"),
    # A clamp that no value meets stands for none.
    "flashinfer.tllm_enums": ("DEFAULT_SWIGLU_LIMIT = torch.finfo(torch.float32).max", "Swiglu = 3", "Relu2 = 6"),
    # The order of rows that the package's preparation gives: groups of 64, the first half first.
    "flashinfer.fused_moe.prepare.prepare_cute_dsl_weights": ("group_size=64, dim=1", "convert_sf_to_mma_layout("),
}

UP_FIRST = "B weights are interleaved: [up_0:64, gate_64:128, up_128:192, gate_192:256, ...]"
"""What the first projection's kernel says of its weights."""


def run_from_text(source: Source, symbol: str, **names: Any) -> Any:
    """A function or constant of the release, made from its text alone; ``names`` are what it finds around it."""
    found = source.resolve(symbol)
    if isinstance(found, Value):
        return eval(compile(ast.Expression(found.value), symbol, "eval"), names)  # noqa: S307
    assert isinstance(found, Function), symbol
    node = ast.parse(ast.unparse(found.node)).body[0]
    assert isinstance(node, ast.FunctionDef)
    node.decorator_list, node.returns = [], None
    for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
        argument.annotation = None
    # Annotations of variables inside name types that are not here.
    scope = dict(names)
    exec(compile(ast.Module([node], []), symbol, "exec"), scope)  # noqa: S102
    return scope[node.name]


PARTS = ("flashinfer/fused_moe/", "flashinfer/cute_dsl/", "flashinfer/quantization/")


def unpack(archive: Path, folder: Path) -> Path:
    """The modules around the kernels, as files: their compiler reads their text."""
    with zipfile.ZipFile(archive) as sources:
        for name in sources.namelist():
            if name.endswith(".py") and (name.startswith(PARTS) or name.count("/") == 1 and name.startswith("flashinfer/")):
                sources.extract(name, folder)
    return folder


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages of FlashInfer without their ``__init__`` (which wants a GPU's libraries), and the build of its CUDA sources left out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != ENGINE:
            return None
        place = self.folder.joinpath(*name.split("."))
        if place.is_dir() or name == "flashinfer.jit":
            spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        return importlib.machinery.ModuleSpec(name, self) if name == "flashinfer.jit.moe_utils" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        module.gen_moe_utils_module = None


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Within it ``import flashinfer...`` reads from ``folder`` (see :func:`unpack`); what was imported is forgotten after it."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == ENGINE]

    before = {name: sys.modules.pop(name) for name in ours()}
    finder = _Finder(folder)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in ours():
            del sys.modules[name]
        sys.modules |= before
