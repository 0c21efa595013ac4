"""What vLLM serves against transformers on the dequantised weights, and what NVFP4 costs: `moe-backend verify` on each model, stored.

    python integration/bench/parity.py --bf16 DIR [--out FILE]

DIR holds the unquantised models, under the names of the NVFP4 ones without "-nvfp4".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from stamp import ROOT, processor, stamp  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bf16", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "integration/bench/results/parity_cpu.json")
    arguments = parser.parse_args()
    rows = []
    for model in sorted((ROOT / "integration/models").glob("*-nvfp4")):
        original = arguments.bf16 / model.name.removesuffix("-nvfp4")
        command = [str(Path(sys.executable).parent / "moe-backend"), "verify", str(model), "--json", "--bf16", str(original)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        rows.append({"provider": "plugin", **json.loads(done.stdout), "model": model.name})
        print(json.dumps(rows[-1], indent=1))
        if done.returncode:
            raise SystemExit(f"{model.name}: outside the bounds")
    arguments.out.write_text(json.dumps({"stamp": stamp(processor()), "ceilings": {}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
