"""On a GPU: minutes of mixed load on a small MoE model through this package's expert kernels, with aborts, and no answer changed.

    python integration/gpu/moe_load.py [--model pycoder-moe-nvfp4] [--minutes 8] [--clients 256] [--dtype bfloat16]
        [--provider plugin] [--out FILE]

mixed_load.py says what is asked and compared.  Exits 1 on an error or a changed answer.  ``--provider vllm`` is the control: the same
load on vLLM's Marlin, whose answers part as often as bf16 makes them.
"""

from __future__ import annotations

from mixed_load import MODELS, measure, parser
from moe_text import NAMES

from moe_backend_plugin.bench.moe import KERNELS


def main() -> None:
    options = parser(__doc__, "moe_load_h200.json", "moe_load.log")
    options.add_argument("--model", choices=NAMES, default=NAMES[0])
    arguments = options.parse_args()
    measure(arguments, MODELS / arguments.model, ["moe"], [], {}, __file__, KERNELS)


if __name__ == "__main__":
    main()
