"""GPU decode against the reference in float64. Outputs are full of NaN before a call, and every bit that a call may not write is compared.

``CALLS`` holds the arguments of most calls by name; all kernels they need are compiled at once, before the first test.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from moe_backend_plugin.gdn import reference, support
from moe_backend_plugin.gdn.slots import NullRule, PoolLayout, Slots
from moe_backend_plugin.kernels.compile import architecture_of, capabilities


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    return None if architecture_of(capability) else f"compute capability {capability}; the kernels run on {capabilities()}"


if reason := missing():
    pytest.skip(f"GDN decode kernels: {reason}", allow_module_level=True)
pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")
from moe_backend_plugin.gdn import cuda  # noqa: E402

DEVICE = torch.device("cuda", 0)
HEAD = cuda.HEAD
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
INT32, INT64 = torch.int32, torch.int64
TOLERANCE = {FP32: 1e-5, BF16: 4e-3, FP16: 1e-3}
LAUNCHES, TABLES = 10, 500
"""Random slot tables: so many launches of so many tables, for one token a row and for speculative rows."""


# --- calls ------------------------------------------------------------------------------------------------------------


def rand(*shape, dtype=FP32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def ints(values, dtype=INT32):
    return torch.tensor(values, device=DEVICE, dtype=dtype)


def states(*shape, dtype, gap=0):
    """[*shape, HEAD, HEAD] at random; ``gap`` elements lie between the entries of the first dimension."""
    size = math.prod(shape[1:]) * HEAD * HEAD
    return rand(shape[0], size + gap, dtype=dtype)[:, :size].view(*shape, HEAD, HEAD)


def problem(tokens, slots, *, state=FP32, act=BF16, bias=None, ratio=2, groups=1, gap=0):
    heads = groups * ratio
    return dict(
        mixed_qkv=rand(tokens, (2 * groups + heads) * HEAD, dtype=act),
        a=rand(tokens, heads, dtype=act),
        b=rand(tokens, heads, dtype=act),
        A_log=torch.rand(heads, device=DEVICE).mul(4).add(0.1).log(),
        dt_bias=rand(heads, dtype=bias or act),
        pool=states(slots, heads, dtype=state, gap=gap),
    )


def single(*, index=INT32, rows=6, **options):
    """One token a row; of the first rows one each is null, negative, and past the pool."""
    call = problem(rows, rows + 3, groups=2, **options)
    slots = (torch.randperm(rows + 2, device=DEVICE)[:rows] + 1).to(index)
    slots[1:4] = ints([0, -3, rows + 3], index)
    return call | {"read": slots}


def split(*, write, rows=6, **options):
    call = single(rows=rows, **options)
    other = torch.full_like(call["read"], -1) if write is None else (torch.randperm(rows + 2, device=DEVICE)[:rows] + 1).to(INT32)
    other[-1:] = rows + 3
    return call | {"write_pool": rand(*call["pool"].shape, dtype=call["pool"].dtype)} | ({} if write is None else {"write": other})


LENGTHS = [3, 0, 8, 1, 9, 5, 8, 2, 1, 4, 2, 0]
COUNTS = [1, 8, 3, 0, 2, 9, 5, 2, 1, 1, 1, 1]


def ragged(mode, *, index=INT32, T=8, shuffle=False, **options):
    """Rows of 0 to 9 tokens where 8 are allowed, accepted counts of 0 to 9, and entries that are not live everywhere."""
    order = torch.randperm(len(LENGTHS)).tolist() if shuffle else range(len(LENGTHS))
    lengths, counts = [LENGTHS[i] for i in order], [COUNTS[i] for i in order]
    rows, tokens = len(lengths), sum(lengths) + 2  # two tokens belong to no row
    slots = 2 * rows * T + 1
    call = problem(tokens, slots, **options) | {"max_tokens": T}
    call["cu_seqlens"] = ints([0, *lengths]).cumsum(0).to(index)
    owned = (torch.randperm(slots - 1, device=DEVICE) + 1).to(index).view(2, rows, T)
    dead = ints([0, -3, slots, 2**31 - 1], index)
    table = owned[0].clone()
    for row, value in zip((7, 8, 9, 10), dead, strict=True):
        table[order.index(row), COUNTS[row] - 1] = value
    table[order.index(2), [1, 6]] = dead[1:3]
    table[order.index(6), 7] = 0
    if mode == "accepted":
        return call | {"read": table, "write": table, "num_accepted": ints(counts, index)}
    call["read"] = table.gather(1, (ints(counts, INT64)[:, None] - 1).clamp(0, T - 1))[:, 0].contiguous()
    if mode == "each":
        elsewhere = owned[1].clone()
        elsewhere[order.index(2), :4] = dead
        return call | {"write": elsewhere}
    if mode == "last":
        elsewhere = owned[1, :, 0].clone()
        elsewhere[[order.index(row) for row in (0, 2, 5, 6)]] = dead
        return call | {"write": elsewhere}
    if mode == "verify":
        return call | {"intermediate": states(rows + 2, T + 1, call["pool"].shape[1], dtype=call["pool"].dtype), "update_state": False}
    if mode == "intermediate":
        return call | {"intermediate": states(rows, T, call["pool"].shape[1], dtype=call["pool"].dtype, gap=64)}
    assert mode in ("same", "none")
    return call | {"update_state": mode == "same"}


def strided(build, **options):
    """Slots share their block with other state, activations and gates are parts of wider projections, as is the output."""
    call = build(gap=192, **options)
    tokens, width = call["mixed_qkv"].shape
    heads = call["a"].shape[1]
    wide = rand(tokens, width + 136, dtype=call["mixed_qkv"].dtype)
    both = rand(tokens, 2 * heads + 3, dtype=wide.dtype)
    return call | {"mixed_qkv": wide[:, 64 : 64 + width], "a": both[:, :heads], "b": both[:, heads : 2 * heads]}


def adversarial(build, **options):
    """Every mix of extreme gates with extreme q and k, some of them in each row."""
    call = build(**options)
    tokens, heads = call["a"].shape
    call["A_log"].copy_(ints([5, -20, 2, 0, -3], FP32).repeat(heads)[:heads])
    extremes = ints([80, -80, 0, 19.5, 20.5], FP32)
    which = torch.arange(tokens, device=DEVICE)
    call["a"].copy_(extremes[which % 5][:, None].expand(-1, heads))
    call["b"].copy_(ints([0, 80, -80], FP32)[which % 3][:, None].expand(-1, heads))
    groups = (call["mixed_qkv"].shape[1] // HEAD - heads) // 2
    q, k = call["mixed_qkv"][:, : groups * HEAD], call["mixed_qkv"][:, groups * HEAD : 2 * groups * HEAD]
    scale = ints([1, 1e-6, 0, 1e4], FP32)
    q.mul_(scale[which % 4][:, None])
    k.mul_(scale[which // 4 % 4][:, None])
    return call


def normed(build, activation, weight=BF16, **options):
    call = build(**options)
    tokens, heads = call["a"].shape
    gate = rand(tokens, heads + 1, HEAD + 8, dtype=call["a"].dtype)[:, :heads, :HEAD]
    return call | {"gate": gate, "norm_weight": rand(HEAD, dtype=weight), "norm_eps": 1e-5, "activation": activation}


def random_tables(speculative, **options):
    """``TABLES`` tables of four rows, each with eight slots of its own, in any order; a quarter of the entries are not live."""
    slots = 8 * TABLES + 1
    owned = torch.rand(TABLES, 8, device=DEVICE).argsort(1) + 8 * torch.arange(TABLES, device=DEVICE)[:, None] + 1
    table = owned.view(-1, 2)[torch.randperm(4 * TABLES, device=DEVICE)].to(INT32)
    dead = ints([0, -1, -(2**31), slots, slots + 99, 2**31 - 1])[torch.randint(6, table.shape, device=DEVICE)]
    table = dead.where(torch.rand(table.shape, device=DEVICE) < 0.25, table)
    if not speculative:
        return problem(4 * TABLES, slots, **options) | {"read": table[:, 0].contiguous()}
    lengths, counts = (torch.randint(4, (4 * TABLES,), device=DEVICE) for _ in "ab")
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(INT32)
    call = problem(int(cu_seqlens[-1]) + 2, slots, **options)
    return call | {"read": table, "write": table, "num_accepted": counts.to(INT32), "cu_seqlens": cu_seqlens, "max_tokens": 2}


CALLS = {
    f"{cuda.name_of(state)}-{cuda.name_of(act)}-{ratio}": partial(
        single, state=state, act=act, ratio=ratio, bias=FP32 if ratio in (2, 8) else act, index=INT64 if ratio == 3 else INT32
    )
    for state in cuda.STATE_TYPES
    for act in cuda.TOKEN_TYPES
    for ratio in support.HEADS_PER_GROUP
}
CALLS |= {
    f"accepted-{cuda.name_of(s)}-{cuda.name_of(i)}": partial(ragged, "accepted", state=s, index=i)
    for s in cuda.STATE_TYPES
    for i in (INT32, INT64)
}
CALLS |= {f"ragged-{mode}": partial(ragged, mode) for mode in ("each", "last", "same", "none", "verify", "intermediate")}
CALLS |= {
    "ragged-last-fp16-tokens": partial(ragged, "last", act=FP16, index=INT64),
    "ragged-verify-bf16": partial(ragged, "verify", state=BF16),
    "split-same": partial(split, write=None),
    "split-last": partial(split, write="last"),
    "split-last-bf16": partial(split, write="last", state=BF16),
    "strided-single": partial(strided, single),
    "strided-single-bf16": partial(strided, single, state=BF16),
    "strided-accepted": partial(strided, partial(ragged, "accepted")),
    "adversarial-single": partial(adversarial, single, rows=240),
    "adversarial-single-bf16": partial(adversarial, single, rows=240, state=BF16),
    "adversarial-accepted": partial(adversarial, partial(ragged, "accepted")),
    "many-rows-bf16": partial(single, rows=1100, state=BF16),
    "norm-silu": partial(normed, single, "silu"),
    "norm-sigmoid": partial(normed, single, "sigmoid"),
    "norm-silu-fp32-weight": partial(normed, single, "silu", FP32, state=BF16),
    "norm-sigmoid-fp32-weight-strided": partial(normed, partial(strided, single), "sigmoid", FP32),
    "norm-silu-accepted": partial(normed, partial(ragged, "accepted"), "silu"),
    "norm-sigmoid-accepted-bf16": partial(normed, partial(ragged, "accepted", state=BF16), "sigmoid"),
    "accepted-wide": partial(ragged, "accepted", groups=6),
    "accepted-wide-bf16": partial(ragged, "accepted", groups=6, state=BF16),
    "accepted-widest-bf16": partial(ragged, "accepted", groups=22, state=BF16),
    "norm-silu-accepted-wide": partial(normed, partial(ragged, "accepted", groups=6), "silu"),
    "norm-silu-accepted-widest-bf16": partial(normed, partial(ragged, "accepted", groups=22, state=BF16), "silu"),
    "norm-adversarial": partial(normed, partial(adversarial, single, rows=240), "silu"),
    "plain": partial(single, ratio=2),
    "tables-single": partial(random_tables, False),
    "tables-single-bf16": partial(random_tables, False, state=BF16),
    "tables-speculative": partial(random_tables, True),
    "tables-speculative-bf16": partial(random_tables, True, state=BF16),
}


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Ask every call which kernel it needs, then compile them side by side."""
    wanted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.kernels, "load", lambda family, variant, arch: wanted.append((family, variant, arch)) or (lambda *args: None))
        for build in CALLS.values():
            call = build()
            cuda.decode(**call, out=poisoned(call))
    cuda._kernel.cache_clear()
    for family, arch in {(family, arch) for family, _, arch in wanted}:
        cuda.kernels.prepare(family, [variant for _, variant, _ in wanted], arch, jobs=16)


# --- what is expected -------------------------------------------------------------------------------------------------


def poisoned(call, strided=False):
    tokens, heads = call["a"].shape
    pad = (1, 8) if strided else (0, 0)
    whole = torch.full((tokens, heads + pad[0], HEAD + pad[1]), math.nan, device=DEVICE, dtype=call["mixed_qkv"].dtype)
    return whole[:, :heads, :HEAD]


def expect(call):
    """What decode's docstring promises, in float64.

    Returns out [tokens, HV, V] (NaN where nothing is written), the state after each token [rows, T, HV, V, K], which of
    those tokens there are [rows, T], and the slot that each of those states goes to (-1: to none).
    """
    pool, A_log = call["pool"], call["A_log"]
    tokens, heads = call["a"].shape
    groups = (call["mixed_qkv"].shape[1] // HEAD - heads) // 2
    begin, end = call.get("live_begin", 1), call.get("live_end", pool.shape[0])
    T = call.get("max_tokens", 1)
    cu = call["cu_seqlens"].long() if "cu_seqlens" in call else torch.arange(tokens + 1, device=DEVICE)
    lengths, rows = cu.diff(), cu.numel() - 1

    read = call["read"].long()
    if "num_accepted" in call:
        column = call["num_accepted"].long() - 1
        known = (column >= 0) & (column < read.shape[1])
        read = read.gather(1, column.clamp(0, read.shape[1] - 1)[:, None])[:, 0].where(known, -1)
    live = (read >= begin) & (read < end) & (lengths <= T)
    step = torch.arange(T, device=DEVICE)
    there = live[:, None] & (step < lengths[:, None])
    token = (cu[:-1, None] + step).where(there, 0)

    q, k, v = call["mixed_qkv"].double()[token].split([groups * HEAD, groups * HEAD, heads * HEAD], -1)
    q, k, v = (x.unflatten(-1, (-1, HEAD)) for x in (q, k, v))
    after = torch.zeros(rows, T, heads, HEAD, HEAD, device=DEVICE, dtype=torch.float64)
    index = read.where(live, -1)
    o = reference.gdn_decode(
        q,
        k,
        v,
        call["a"][token],
        call["b"][token],
        A_log,
        call["dt_bias"],
        pool,
        Slots(index, index, PoolLayout.of(pool), NullRule.NEGATIVE, True),
        lengths=lengths.where(live, 0),
        intermediate=after,
        update_state=False,
        compute_dtype=torch.float64,
    )
    if "gate" in call:
        gate = call["gate"].double()[token]
        gate = F.silu(gate) if call["activation"] == "silu" else gate.sigmoid()
        o = F.rms_norm(o, (HEAD,), call["norm_weight"].double(), call["norm_eps"]) * gate
    out = torch.full((tokens, heads, HEAD), math.nan, device=DEVICE, dtype=torch.float64)
    out[: int(cu[-1])] = 0
    out[token[there]] = o[there]

    write = call["write"].long() if "write" in call else read
    if write.dim() == 1:
        write = torch.where(step == lengths[:, None] - 1, write[:, None], -1)
    write = write.where(there & (write >= begin) & (write < end), -1)
    return out, after, there, write if call.get("update_state", True) else torch.full_like(write, -1)


def memory(x):
    """Every element between the first and the last of ``x``, gaps included, as integers (so that NaN compares equal)."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((size,), (1,)).view({2: torch.int16, 4: INT32, 8: INT64}[x.element_size()])


def assert_close(found, expected, dims, tolerance=None):
    """By the norm over the last ``dims`` dimensions: one head's output, or one head's state."""
    error = (found.double() - expected).flatten(-dims).norm(dim=-1) / expected.flatten(-dims).norm(dim=-1).clamp(min=1e-6)
    worst = float(error.max()) if error.numel() else 0.0
    assert worst <= (tolerance or TOLERANCE[found.dtype]), f"relative error {worst}"


def check(call, out=None):
    """Run decode, compare what it wrote, and see that it wrote nothing else."""
    out = poisoned(call) if out is None else out
    expected, after, there, write = expect(call)
    tensors = {"out": out} | {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    before = {name: memory(x).clone() for name, x in tensors.items()}
    cuda.decode(**call, out=out)

    untouched = expected.isnan()
    assert torch.equal(out.isnan(), untouched)
    found, expected = out.where(~untouched, 0), expected.where(~untouched, 0)
    assert_close(found, expected, 1)
    assert not found[(expected == 0).flatten(1).all(1)].any(), "skipped rows are not zero"

    written = {"out": (slice(None),)}
    stored = write >= 0
    if stored.any():
        target = "write_pool" if "write_pool" in call else "pool"
        written[target] = (write[stored],)
        assert_close(call[target][write[stored]], after[stored], 2)
    if "intermediate" in call:
        written["intermediate"] = there.nonzero(as_tuple=True)
        assert_close(call["intermediate"][written["intermediate"]], after[there], 2)
    for name, x in tensors.items():
        kept = before[name].view(x.dtype).as_strided(x.shape, x.stride())
        if name in written:
            kept[written[name]] = x[written[name]]
        assert torch.equal(memory(x), before[name]), f"{name}: written where nothing may be"


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("tables")])
def test_call(name):
    call = CALLS[name]()
    check(call, poisoned(call, strided="strided" in name))


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("tables")])
def test_random_tables(name):
    for _ in range(2 if name.endswith("bf16") else LAUNCHES):
        check(CALLS[name]())


@pytest.mark.parametrize(("begin", "end"), [(0, None), (0, 8), (3, 5)])
def test_live_range(begin, end):
    """Slot 0 is an ordinary one for SGLang, and its last one a sentinel."""
    call = CALLS["plain"]() | {"live_begin": begin}
    call["read"].copy_(ints([0, 8, 3, 4, 5, -1]))
    check(call if end is None else call | {"live_end": end})


def test_rows_may_not_be_longer_than_the_kernel_can_hold():
    call = CALLS["ragged-same"]()
    with pytest.raises(ValueError, match="max_tokens: found 9, allowed 1..8"):
        cuda.decode(**(call | {"max_tokens": 9}), out=poisoned(call))


@pytest.mark.parametrize(("state", "of_states", "of_outputs"), [(FP32, 1e-6, 1e-3), (BF16, 2e-2, 2e-2)])
def test_many_tokens_equal_single_tokens(state, of_states, of_outputs):
    """Back to back, each launch reading what the one before has written: a state of 16 bits is then rounded after every token."""
    rows, T = 5, 8
    long = problem(rows * T, rows + 1, state=state)
    slots = ints([3, 1, 5, 2, 4])
    short = long | {"pool": long["pool"].clone(), "read": slots}
    long |= {"read": slots, "cu_seqlens": ints([i * T for i in range(rows + 1)]), "max_tokens": T}
    out = poisoned(long)
    cuda.decode(**long, out=out)
    steps = []
    for t in range(T):
        part = {name: short[name].view(rows, T, -1)[:, t] for name in ("mixed_qkv", "a", "b")}
        steps.append(poisoned(short | part))
        cuda.decode(**(short | part), out=steps[-1])
    assert_close(short["pool"], long["pool"].double(), 2, of_states)
    steps = torch.stack(steps, 1).flatten(0, 1)
    assert_close(steps, out.double(), 1, of_outputs)  # in fp32 a last bit of bf16 here and there
    assert state is BF16 or float((steps == out).float().mean()) > 0.99


def test_no_rows_and_no_tokens():
    call = CALLS["plain"]()
    empty = {name: call[name][:0] for name in ("mixed_qkv", "a", "b", "read")}
    check(call | empty)
    call = CALLS["ragged-same"]()
    check(call | {"cu_seqlens": torch.zeros_like(call["cu_seqlens"])})


@pytest.mark.parametrize("state", [FP32, BF16])
def test_offsets_past_32_bits(state):
    """The last slots of a pool of more than 2^31 elements; everything else in it is zero and stays so."""
    call = CALLS["plain"]() if state is FP32 else CALLS["bfloat16-bfloat16-2"]()
    heads = call["pool"].shape[1]
    slots = 2**31 // (heads * HEAD * HEAD) + 8
    needed, free = slots * call["pool"][0].nbytes + 2**30, torch.cuda.mem_get_info()[0]
    if free < needed:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"{needed >> 30} GB of GPU memory needed, {free >> 30} GB free")
    small = call | {"read": ints([1, 2, 3, 4, 0, slots])}
    used = ints([slots - 1, slots - 8, slots - 9, 3], INT64)
    big = call | {
        "read": torch.cat([used.int(), small["read"][4:]]),
        "pool": torch.zeros(slots, heads, HEAD, HEAD, device=DEVICE, dtype=state),
    }
    big["pool"][used] = small["pool"][1:5]
    outs = [poisoned(call) for _ in "ab"]
    cuda.decode(**small, out=outs[0])
    cuda.decode(**big, out=outs[1])
    assert torch.equal(*outs) and torch.equal(big["pool"][used], small["pool"][1:5])
    big["pool"][used] = 0
    assert not any(bool(part.any()) for part in big["pool"].split(4096))


def test_a_table_written_just_before_is_read():
    """Launches are programmatic: one may start early, but must not take the table or a state from before."""
    rows, rounds = 64, 200
    call = problem(rows, rows + 1)
    tables = torch.stack([torch.randperm(rows, device=DEVICE)[:rows] + 1 for _ in range(rounds)]).int()
    tables[:, ::7] = 0
    results = []
    for careful in (True, False):
        run = call | {"pool": call["pool"].clone(), "read": tables[0].clone()}
        outs = [poisoned(run) for _ in range(rounds)]
        torch.cuda.synchronize()
        for table, out in zip(tables, outs, strict=True):
            run["read"].copy_(table)
            if careful:
                torch.cuda.synchronize()
            cuda.decode(**run, out=out)
        results.append((memory(run["pool"]), memory(torch.stack(outs))))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_runs_on_the_current_stream():
    """On any other one it would find a table of null slots."""
    call = CALLS["plain"]()
    slots, out, expected = call["read"].clone(), poisoned(call), expect(call)[0]
    call["read"].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        call["read"].copy_(slots)
        cuda.decode(**call, out=out)
    torch.cuda.synchronize()
    assert_close(out, expected, 1)


@pytest.mark.parametrize(
    "build",
    [
        partial(CALLS["accepted-float32-int32"], shuffle=True),
        partial(CALLS["ragged-same"], shuffle=True),
        partial(ragged, "accepted", state=BF16, shuffle=True),
        single,
        partial(single, state=BF16),
    ],
    ids=["accepted-float32", "ragged-float32", "accepted-bfloat16", "single-float32", "single-bfloat16"],
)
def test_graph_replays_equal_eager_calls(build):
    """Three launches in one graph, each resuming from the one before; slots, lengths and accepted counts change between replays."""
    call = build()
    outs, eager = ([poisoned(call) for _ in range(3)] for _ in "ab")

    def launch(call, outs):
        for out in outs:
            cuda.decode(**call, out=out)

    launch(call, outs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(call, outs)
    for _ in range(5):
        fresh = build()
        for key, value in call.items():
            if isinstance(value, torch.Tensor):
                value.copy_(fresh[key])
        for out in (*outs, *eager):
            out.fill_(math.nan)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        for out in eager:
            cuda.decode(**fresh, out=out)
            torch.cuda.synchronize()
        assert torch.equal(memory(call["pool"]), memory(fresh["pool"]))
        assert torch.equal(memory(torch.stack(outs)), memory(torch.stack(eager)))


@pytest.mark.parametrize("name", ["plain", "accepted-float32-int32", "norm-silu"])
def test_a_call_allocates_nothing(name):
    call = CALLS[name]()
    out = poisoned(call)
    cuda.decode(**call, out=out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    cuda.decode(**call, out=out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
