"""What the scripts of integration/gpu decide without a GPU: what counts as a changed answer, and what is within bounds."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import json
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scripts():
    """The modules, imported as the scripts import each other."""
    sys.path.insert(0, str(ROOT / "integration/gpu"))
    import mixed_load
    import sglang_server
    import sglang_text
    import tuner_agreement

    yield type("Scripts", (), {"load": mixed_load, "server": sglang_server, "text": sglang_text, "agreement": tuner_agreement})
    sys.path.remove(str(ROOT / "integration/gpu"))


class Recorded:
    """A client that gives recorded answers, one after the other; an exception is raised."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)
        self.aborted: list[tuple[list[int], int]] = []

    async def answer(self, prompt, tokens):
        found = self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    async def give_up(self, prompt, tokens, after):
        self.aborted.append((prompt, after))


def test_a_changed_answer_is_told_from_a_tie(scripts):
    """Answers that part where two tokens were all but tied are no error; any other change is, wherever it begins."""
    Answer = scripts.load.Answer
    alone = Answer([5, 6, 7], [{5: -0.1, 9: -0.2}, {6: -0.1, 8: -3.0}, {7: -0.1}])
    client = Recorded(
        Answer([5, 6, 7], [], cached=2), Answer([9, 1, 1], [], cached=3), Answer([5, 8, 1], []), Answer([5, 6, 1], []), OSError("reset")
    )
    load = scripts.load.Load(client, [[1, 2]], [3])
    load.alone = [[alone]]

    async def ask():
        for _ in range(4):
            await load.one(0)
        await load.abort(0, 2)
        with pytest.raises(OSError, match="reset"):
            await load.one(0)

    asyncio.run(ask())
    assert (load.done, load.equal, load.tokens, load.cached, load.aborted) == (4, 1, 12, 5, 1)
    assert [entry[1] for entry in load.ties] == [0] and [entry[1] for entry in load.wrong] == [1, 2]
    assert load.wrong[0][2] == pytest.approx(2.9) and load.wrong[1][2] == float("inf")
    assert client.aborted == [([1, 2], 2)]


def test_an_answer_may_be_the_one_that_resumed_from_the_cache(scripts):
    """What the prefix cache changes without company is counted for itself, and is no change under load."""
    Answer = scripts.load.Answer
    first = Answer([5, 6], [{5: -0.1, 9: -2.0}, {6: -0.1}])
    resumed = Answer([9, 7], [{9: -0.4, 5: -1.2}, {7: -0.1, 8: -0.15}])
    asked = [first, first, resumed, first, resumed, Answer([9, 8], []), Answer([4, 4], [])]
    load = scripts.load.Load(Recorded(*asked), [[1], [2]], [2, 2])

    async def ask():
        for _ in range(2):
            await load.ask_alone()
        for _ in range(3):
            await load.one(0)

    asyncio.run(ask())
    assert load.alone == [[first, resumed], [first, first]] and load.changed_by_cache == 1
    assert (load.equal, [entry[1] for entry in load.ties], [entry[1] for entry in load.wrong]) == (1, [1], [0])


def test_a_run_that_is_cut_off_has_said_something(scripts, monkeypatch):
    class Same:
        async def answer(self, prompt, tokens):
            await asyncio.sleep(0)
            return scripts.load.Answer([5], [{5: -0.1}])

        async def give_up(self, prompt, tokens, after):
            await asyncio.sleep(0)

    @asynccontextmanager
    async def connect():
        yield Same()

    seen = []
    monkeypatch.setattr(scripts.load, "REPORT_SECONDS", 0.02)
    model = scripts.load.MODELS / "pycoder-moe-nvfp4"
    load = asyncio.run(scripts.load.run(model, 0.15 / 60, 2, connect, lambda load, minutes: seen.append((load.done, minutes))))
    assert len(seen) >= 2 and 0 < seen[0][0] < load.done and seen[0][1] < seen[-1][1] and load.equal == load.done


def test_workers_note_errors_and_go_on(scripts):
    load = scripts.load.Load(Recorded(*[OSError("reset")] * 1000), [[1]], [4])
    load.alone = [[]]

    async def work():
        import time

        await load.worker(0, time.monotonic() + 0.05)

    asyncio.run(work())
    assert load.errors and set(load.errors) <= {"OSError: reset", "IndexError: pop from empty list"} and load.aborted


def test_vllm_reads_the_servers_command_line(scripts):
    """SGLang's is read in integration/sglang_cpu."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    model = scripts.load.MODELS / "pycoder-moe-nvfp4"
    command = scripts.load.command_of(model, {"moe": {"provider": "cutedsl"}}, 1234, ["--moe-backend", "marlin"])
    assert command[1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"]
    found = make_arg_parser(FlexibleArgumentParser()).parse_args(command[4:])
    assert (found.model_tag, found.port, found.quantization) == (str(model), 1234, "nvfp4_cutedsl")
    assert {name: getattr(found, name) for name in scripts.load.CACHE} == scripts.load.CACHE
    assert found.additional_config == {"moe_backend_plugin": {"moe": {"provider": "cutedsl"}}}


@pytest.mark.parametrize(("script", "kinds"), [("gdn_load", ["gdn", "moe"]), ("moe_load", ["moe"])])
@pytest.mark.parametrize(("provider", "runs"), [("plugin", "cutedsl"), ("vllm", "engine")])
def test_a_load_runs_all_kinds_of_layer_with_its_provider(scripts, script, kinds, provider, runs, monkeypatch):
    """And the control has Marlin's experts."""
    commands = []
    monkeypatch.setattr(scripts.load, "start", lambda command, *_: commands.append(command))
    monkeypatch.setattr(scripts.load, "record", lambda arguments, model, cell, serve, *_: serve())
    monkeypatch.setattr(sys, "argv", [script, "--provider", provider, "--dtype", "float16"])
    importlib.import_module(script).main()
    (command,) = commands
    settings = json.loads(command[command.index("--additional-config") + 1])["moe_backend_plugin"]
    assert settings == {kind: {"provider": runs} for kind in kinds}
    assert command[command.index("--dtype") + 1] == "float16" and ("marlin" in command) == (provider == "vllm")


@pytest.mark.parametrize("script", ["gdn_text", "moe_text", "sglang_text"])
def test_a_child_takes_the_runs_that_its_script_makes(scripts, script, monkeypatch):
    """And one model, of the scripts that have several."""
    module = importlib.import_module(script)
    runs = []
    monkeypatch.setattr(module, "measure", lambda file, model, found, **_: runs.extend(found) or iter(()))
    monkeypatch.setattr(module, "record", lambda rows, *_, **__: list(rows))
    monkeypatch.setattr(sys, "argv", [script, *(["--models", "pycoder-next-nvfp4"] if script != "gdn_text" else [])])
    module.main()
    assert runs
    for run in runs:
        inspect.signature(module.child).bind("pycoder-next-nvfp4", **json.loads(json.dumps(run)))


def test_texts_are_compared_with_vllms(scripts):
    ours = {"prompts": [[1], [2], [3]], "texts": [[7] * 256, [7] * 64 + [8] * 192, [8] * 256]}
    stored = {"prompts": [[1], [2], [3]], "plugin": [[7] * 256] * 3}
    as_vllm = {"as_vllm_16": 2, "as_vllm_64": 2, "as_vllm_256": 1}
    assert scripts.text.as_vllm(ours, stored, "cutedsl") == as_vllm
    assert scripts.text.as_vllm(ours, stored, "sglang") == {}
    stored["vllm"] = [[7] * 16 + [9] * 240, [7] * 256, [7] * 256]
    both = {"in_vllm_16": 3, "in_vllm_64": 2, "in_vllm_256": 2}
    assert scripts.text.as_vllm(ours, stored, "cutedsl") == as_vllm | both
    assert scripts.text.as_vllm(ours, stored, "sglang") == {"as_vllm_16": 2, "as_vllm_64": 1, "as_vllm_256": 0} | both
    with pytest.raises(SystemExit, match="other prompts"):
        scripts.text.as_vllm({**ours, "prompts": [[1], [2], [4]]}, stored, "cutedsl")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"relative_perplexity": 0.006}, False),
        ({"prompt_relative_perplexity": -0.006}, False),
        ({"as_vllm_16": 29}, False),
        ({"as_vllm_16": 30, "as_vllm_64": 20}, True),
        ({"served_by": None}, False),
        ({"served_by": None, "provider": "sglang"}, True),
        ({"drafts": 3}, False),  # nothing says who verifies them
        ({"drafts": 3, "model": "pycoder-moe-nvfp4"}, True),
    ],
)
def test_bounds_of_a_text_row(scripts, change, expected):
    row = {"model": "pycoder-next-nvfp4", "provider": "cutedsl", "drafts": 0, "served_by": "cutedsl (x)"}
    row |= {"relative_perplexity": 0.001, "prompt_relative_perplexity": 0.0}
    assert scripts.text.within(row | change) is expected


def test_the_log_has_to_name_the_kernels(scripts, tmp_path):
    log = tmp_path / "server.log"
    log.write_text("NVFP4 moe layers are served by: cutedsl (sm90)\n")
    assert scripts.server.missing(log, "pycoder-moe-nvfp4", "cutedsl") == []
    assert scripts.server.missing(log, "pycoder-next-nvfp4", "cutedsl") == ["Gated-delta-net decode is served by"]
    assert scripts.server.missing(log, "pycoder-next-nvfp4", "sglang") == []


# --- /generate, as a server answers; SGLang's own is asked in integration/sglang_cpu -------------------------------------------------


def answer(tokens: int, text: str = "x") -> dict:
    entries = [[-0.5, 10 + i, "t"] for i in range(tokens)]
    tops = [[[-0.5, 10 + i, "t"], [-1.5, 99, "u"]] for i in range(tokens)]
    prompt = [[None, 1, "a"], [-2.0, 2, "b"]]
    meta = {"output_token_logprobs": entries, "output_top_logprobs": tops, "input_token_logprobs": prompt, "cached_tokens": 1}
    return {"text": text, "output_ids": [entry[1] for entry in entries], "meta_info": meta}


def test_answers_of_sglang_are_read(scripts):
    found = answer(2)
    assert scripts.server.chosen(found) == ([10, 11], [-0.5, -0.5])
    assert scripts.server.prompt_scores(found) == [-2.0]
    assert scripts.server.alternatives(found) == [{10: -0.5, 99: -1.5}, {11: -0.5, 99: -1.5}]


def test_the_client_refuses_short_answers_and_leaves_streams(scripts, monkeypatch):
    """An empty text and a short answer are errors, a refused request too; a stream is left while it still goes on."""
    from aiohttp import web

    asked, left = [], asyncio.Event()

    async def generate(request):
        body = await request.json()
        asked.append(body)
        if body["input_ids"] == [400]:
            return web.json_response({"error": {"message": "no"}}, status=400)
        if not body["stream"]:
            return web.json_response(answer(body["input_ids"][0], "" if body["input_ids"] == [4] else "x"))
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"data: " + json.dumps(answer(1)).encode() + b"\n\n")
                await asyncio.sleep(0.005)
        finally:
            left.set()

    async def run():
        app = web.Application()
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        monkeypatch.setattr(scripts.server, "PORT", runner.addresses[0][1])
        async with scripts.server.client() as client:
            assert scripts.server.chosen(await client.generate([3], 3))[0] == [10, 11, 12]
            with pytest.raises(RuntimeError, match="3 tokens of 5"):
                await client.generate([3], 5)
            with pytest.raises(RuntimeError, match="text ''"):
                await client.generate([4], 4)
            with pytest.raises(RuntimeError, match="status 400"):
                await client.generate([400], 4)
            await client.give_up([1], 100, 3)
            await asyncio.wait_for(left.wait(), 10)
        await runner.cleanup()

    asyncio.run(run())
    assert asked[0] == scripts.server.payload([3], 3) and asked[-1]["stream"]


def tuned(*chosen: str, problem: str = "p") -> dict:
    buckets = {str(2**i): {"tactic": tactic} for i, tactic in enumerate(chosen)}
    return {"entries": [{"problem": problem, "stamp": "s", "buckets": buckets}]}


def test_two_tuning_runs_are_compared_bucket_by_bucket(scripts):
    problem, rows = scripts.agreement.paired(tuned("a", "b"), tuned("a", "c", "only one has it"))
    assert problem == "p" and [(row["tokens"], row["agree"]) for row in rows] == [(1, True), (2, False)]
    many = [{"agree": True, "loss": 0.0}] * 19
    assert scripts.agreement.within(many) and scripts.agreement.within([*many, {"agree": False, "loss": 0.01}])
    assert not scripts.agreement.within([*many, {"agree": False, "loss": 0.011}])
    assert not scripts.agreement.within([*many[1:], {"agree": False, "loss": 0.0}])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (tuned("a", problem="q"), "problem: found p and q"),
        (tuned(), "buckets: found 1 and ; allowed: some in common"),
        ({"entries": []}, "1 and 0 entries"),
    ],
)
def test_runs_of_other_layers_are_not_compared(scripts, other, words):
    with pytest.raises(SystemExit, match=words):
        scripts.agreement.paired(tuned("a"), other)
