"""On a GPU: minutes of mixed load on pycoder-next through this package's GDN kernels, with aborts, and no answer changed.

    python integration/gpu/gdn_load.py [--minutes 8] [--clients 256] [--dtype bfloat16] [--drafts 0] [--state-dtype float32]
        [--provider plugin] [--out FILE]

mixed_load.py says what is asked and compared; here prompts resume from copied states.  Exits 1 on an error or a changed answer.
``--provider vllm`` is the control: the same load on vLLM's own kernels, Marlin for the experts.
"""

from __future__ import annotations

import json

from mixed_load import MODELS, measure, parser

MODEL = MODELS / "pycoder-next-nvfp4"


def main() -> None:
    options = parser(__doc__, "gdn_load_h200.json", "gdn_load.log")
    options.add_argument("--drafts", type=int, default=0)
    options.add_argument("--state-dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--provider", choices=["plugin", "vllm"], default="plugin")
    arguments = options.parse_args()
    further = ["--mamba-ssm-cache-dtype", arguments.state_dtype]
    if arguments.drafts:
        speculation = {"method": "ngram", "num_speculative_tokens": arguments.drafts, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
        further += ["--speculative-config", json.dumps(speculation)]
    if arguments.provider == "vllm":
        further += ["--moe-backend", "marlin"]
    cell = {"provider": arguments.provider, "drafts": arguments.drafts, "state_dtype": arguments.state_dtype}
    settings = {kind: {"provider": "cutedsl" if arguments.provider == "plugin" else "engine"} for kind in ("gdn", "moe")}
    measure(arguments, MODEL, cell, settings, further, "python integration/gpu/gdn_load.py", "gdn_decode")


if __name__ == "__main__":
    main()
