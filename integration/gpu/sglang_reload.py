"""On a GPU: a small model that SGLang was given other weights and then its own again says what it said before.

    python integration/gpu/sglang_reload.py [--models pycoder-moe-nvfp4 ...] [--out FILE]

16 prompts are continued by 64 greedy tokens through CUDA graphs, one at a time.  Then /update_weights_from_disk loads a copy of the model
whose experts have the opposite sign, in place, and another loads the model itself, which is what reinforcement learning does in every step.
The graphs are those from the start.  Stores a row for each model; exits 1 unless the other weights changed texts and all texts are the
first ones in the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sglang_server
from decoded_text import MODELS, RESULTS, prompts_of, record
from mixed_load import stop
from sglang_checkpoint import loadable

from moe_backend_plugin.bench.moe import KERNELS

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 64


def with_other_experts(model: Path, target: Path) -> Path:
    """A copy of a ModelOpt checkpoint whose experts' outputs have the opposite sign."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, target)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".experts." in name and name.endswith(".down_proj.weight"):
            tensors[name] = tensor ^ 0x88  # the sign bits of two E2M1 codes
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def texts_of(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """One at a time: sums depend on the batch, and with them which of two likely tokens is the likelier."""

    async def ask() -> list[list[int]]:
        async with sglang_server.client() as client:
            return [sglang_server.chosen(await client.generate(prompt, tokens))[0] for prompt in prompts]

    return asyncio.run(ask())


def reload(model: Path) -> None:
    """Load the weights of ``model`` into the running server. Raises SystemExit with its words if it does not."""
    body = json.dumps({"model_path": str(model)}).encode()
    url = f"http://127.0.0.1:{sglang_server.PORT}/update_weights_from_disk"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=600) as response:
            said = json.load(response)
    except urllib.error.HTTPError as error:
        said = json.load(error)
    if not said["success"]:
        raise SystemExit(f"/update_weights_from_disk: {said['message']}")


def rows(models: Sequence[str], backends: Sequence[str]) -> Iterator[dict[str, Any]]:
    for name in models:
        prompts = prompts_of(MODELS / name, PROMPT_TOKENS, PROMPTS)
        with tempfile.TemporaryDirectory() as folder:
            model, log = loadable(MODELS / name, Path(folder)), Path(folder) / "server.log"
            other = with_other_experts(model, Path(folder) / "other")
            server = sglang_server.start(model, "cutedsl", log, *backends)
            try:
                if unsaid := sglang_server.missing(log, name, "cutedsl"):
                    raise SystemExit(f"the log does not say: {', '.join(unsaid)}")
                texts = [texts_of(prompts, NEW_TOKENS)]
                for weights in (other, model):
                    reload(weights)
                    texts.append(texts_of(prompts, NEW_TOKENS))
            finally:
                stop(server)
        first, others, last = texts
        same, unchanged = (sum(a == b for a, b in zip(first, found, strict=True)) for found in (last, others))
        yield {"model": name, "provider": "cutedsl", "texts": PROMPTS, "changed_by_other_weights": PROMPTS - unchanged, "equal": same}


def within(row: dict[str, Any]) -> bool:
    return row["equal"] == row["texts"] and row["changed_by_other_weights"] > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sglang_server.MODELS, default=sglang_server.MODELS)
    parser.add_argument("--attention-backend", default="triton")
    parser.add_argument("--sampling-backend", default="pytorch")
    parser.add_argument("--out", type=Path, default=RESULTS / "sglang_reload_h200.json")
    arguments = parser.parse_args()
    backends = ["--attention-backend", arguments.attention_backend, "--sampling-backend", arguments.sampling_backend]
    record(rows(arguments.models, backends), arguments.out, __file__, (*KERNELS, "gdn_decode"), within)


if __name__ == "__main__":
    main()
