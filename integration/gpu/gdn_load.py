"""On a GPU: minutes of mixed load on pycoder-next through this package's GDN kernels, with aborts, and no answer changed.

    python integration/gpu/gdn_load.py [--minutes 8] [--clients 256] [--dtype bfloat16] [--drafts 0] [--state-dtype float32]
        [--provider plugin] [--out FILE]

mixed_load.py says what is asked and compared; here prompts resume from copied states.  Exits 1 on an error or a changed answer.
``--provider vllm`` is the control: the same load on vLLM's own kernels, Marlin for the experts.
"""

from __future__ import annotations

import json

from mixed_load import MODELS, measure, ngrams, parser

from moe_backend_plugin.bench.moe import KERNELS

MODEL = MODELS / "pycoder-next-nvfp4"


def main() -> None:
    options = parser(__doc__, "gdn_load_h200.json", "gdn_load.log")
    options.add_argument("--drafts", type=int, default=0)
    options.add_argument("--state-dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = options.parse_args()
    further = ["--mamba-ssm-cache-dtype", arguments.state_dtype]
    if arguments.drafts:
        further += ["--speculative-config", json.dumps(ngrams(arguments.drafts))]
    cell = {"drafts": arguments.drafts, "state_dtype": arguments.state_dtype}
    measure(arguments, MODEL, ["gdn", "moe"], further, cell, __file__, (*KERNELS, "gdn_decode"))


if __name__ == "__main__":
    main()
