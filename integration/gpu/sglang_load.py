"""On a GPU: minutes of mixed load on a small model in SGLang, with aborts and radix-cache hits, and no answer changed.

    python integration/gpu/sglang_load.py [--model pycoder-next-nvfp4] [--minutes 8] [--clients 256] [--provider cutedsl] [--out FILE]

mixed_load.py says what is asked and compared.  Exits 1 on an error, a changed answer, or where no prompt began with what the radix cache
had.  ``--provider sglang`` is the control: the same load on SGLang's own kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import sglang_server
from mixed_load import MODELS, Answer, parser, record, stop
from sglang_checkpoint import loadable

from moe_backend_plugin.bench.moe import KERNELS

TOPS = 5


class RadixClient:
    """The client of mixed_load.py, by SGLang's own /generate."""

    def __init__(self, client: sglang_server.Client) -> None:
        self._client = client

    @classmethod
    @asynccontextmanager
    async def connect(cls):
        async with sglang_server.client() as client:
            yield cls(client)

    async def answer(self, prompt: Sequence[int], tokens: int) -> Answer:
        found = await self._client.generate(prompt, tokens, tops=TOPS)
        return Answer(sglang_server.chosen(found)[0], sglang_server.alternatives(found), found["meta_info"]["cached_tokens"])

    async def give_up(self, prompt: Sequence[int], tokens: int, after: int) -> None:
        await self._client.give_up(prompt, tokens, after)


def main() -> None:
    options = parser(__doc__, "sglang_load_h200.json", "sglang_load.log", ("cutedsl", "sglang"))
    options.add_argument("--model", choices=sglang_server.MODELS, default=sglang_server.MODELS[0])
    options.add_argument("--attention-backend", default="triton")
    options.add_argument("--sampling-backend", default="pytorch")
    options.add_argument("--gpus", type=int, default=1, help="tensor parallel over so many")
    sglang_server.add_options(options)
    arguments = options.parse_args()
    model, provider = MODELS / arguments.model, arguments.provider
    further = ["--attention-backend", arguments.attention_backend, "--sampling-backend", arguments.sampling_backend]
    columns = {"gpus": arguments.gpus, "state_dtype": arguments.state_dtype, "dp_attention": arguments.dp_attention}
    further += ["--dtype", arguments.dtype, *sglang_server.further_of(model.name, **columns)]
    if not sglang_server.has_states(model.name):
        columns["state_dtype"] = None

    scratch = tempfile.TemporaryDirectory()

    def serve():
        server = sglang_server.start(loadable(model, Path(scratch.name)), provider, arguments.log, *further)
        if unsaid := sglang_server.missing(arguments.log, model.name, provider):
            stop(server)
            raise SystemExit(f"{arguments.log} does not say: {', '.join(unsaid)}")
        return server

    record(arguments, model, columns, serve, RadixClient.connect, __file__, (*KERNELS, "gdn_decode"), cached=True)


if __name__ == "__main__":
    main()
