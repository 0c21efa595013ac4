"""On a GPU: what pycoder-moe and pycoder-next say is what transformers says of the same tokens.

    python integration/gpu/moe_text.py [--models pycoder-moe-nvfp4 ...] [--providers plugin vllm] [--texts FILE] [--out FILE]
    python integration/gpu/moe_text.py --providers plugin [--gpus 2 [--expert-parallel]] [--compile] --out FILE

64 prompts of 256 tokens are continued by 256 greedy tokens (decoded_text.py says how they are compared), so that prefills (16,384 tokens
in a call) and decodes (64 tokens in a call, through CUDA graphs) are both looked at, with this package's expert kernels and with vLLM's
Marlin.  Stores one row a run; exits 1 where the perplexity of prompts or of decoded tokens differs by more than 0.5 % from
transformers' on the dequantised weights, or a layer was served by another provider than the one asked for.  ``--texts``: store prompts
and every provider's tokens too, for sglang_text.py, which runs in another environment.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import chain
from pathlib import Path

from decoded_text import MODELS, RESULTS, add_options, generate, hand_back, measure, options_of, record, same_perplexity
from sglang_checkpoint import loadable

from moe_backend_plugin.bench.moe import KERNELS

NAMES = ("pycoder-moe-nvfp4", "pycoder-next-nvfp4")
SETTINGS = {"plugin": {"moe": {"provider": "cutedsl"}}, "vllm": {"moe": {"provider": "engine"}}}
ENGINE = {"plugin": {}, "vllm": {"moe_backend": "marlin"}}


def child(
    model: str,
    provider: str,
    fp32_logits: bool,
    gpus: int,
    expert_parallel: bool,
    compile: bool,
    dtype: str,
    as_sglang: bool,
) -> dict:
    engine = {"max_num_batched_tokens": 16384, "tensor_parallel_size": gpus, "enable_expert_parallel": expert_parallel}
    engine |= ENGINE[provider] | {"dtype": dtype} | ({"compilation_config": {}} if compile else {})
    engine |= {"hf_overrides": {"head_dtype": "float32"}} if fp32_logits else {}
    with tempfile.TemporaryDirectory() as folder:
        served = loadable(MODELS / model, Path(folder)) if as_sglang else MODELS / model
        return generate(served, 256, SETTINGS[provider], True, **engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--providers", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=RESULTS / "moe_text_h200.json")
    parser.add_argument("--texts", type=Path)
    add_options(parser)
    parser.add_argument("--compile", action="store_true", help="with torch.compile and piecewise graphs, as vLLM has by default")
    parser.add_argument("--as-sglang", action="store_true", help="the checkpoint that SGLang can load (sglang_checkpoint.py)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        model, run = arguments.child
        hand_back(child(model, **json.loads(run)))
        return
    more = {"compile": arguments.compile, "as_sglang": arguments.as_sglang}
    runs = [{"provider": provider, **options_of(arguments), **more} for provider in arguments.providers]
    texts: dict[str, dict] = {}

    def rows(name: str):
        def keep(found: dict, run: dict) -> dict:
            texts.setdefault(name, {"prompts": found["prompts"]})[run["provider"]] = found["texts"]
            if arguments.texts:
                arguments.texts.write_text(json.dumps(texts) + "\n")
            return {}

        return measure(__file__, MODELS / name, runs, said="NVFP4 moe layers are served by", more=keep)

    def within(row: dict) -> bool:
        wanted = SETTINGS[row["provider"]]["moe"]["provider"]
        return same_perplexity(row) and (row["served_by"] or "").startswith(wanted)

    record(chain.from_iterable(map(rows, arguments.models)), arguments.out, __file__, KERNELS, within)


if __name__ == "__main__":
    main()
