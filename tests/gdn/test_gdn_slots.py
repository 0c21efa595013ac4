"""From each engine's metadata to split-pool indices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_backend_plugin.gdn.slots import NULL, NullRule, PoolLayout, Slots, SlotsError, from_sglang, from_vllm_decode, from_vllm_spec

POOL = PoolLayout(16, 540672)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_vllm_decode_is_in_place_and_int64():
    s = from_vllm_decode(ints(3, 7, 0, 0, 9), 4, POOL)
    assert s.read.dtype == torch.int64 and s.read.tolist() == [3, 7, 0, 0]
    assert s.same_slots and s.write is s.read
    assert s.is_live(s.read).tolist() == [True, True, False, False]


def test_offsets_of_large_pools_do_not_wrap():
    s = from_vllm_decode(ints(4099), 1, PoolLayout(4100, 540672))
    assert (s.read * s.pool.slot_stride).tolist() == [4099 * 540672] and 4099 * 540672 > 2**31


def test_vllm_spec_reads_the_accepted_column():
    index = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]], dtype=torch.int32)
    s = from_vllm_spec(index, ints(1, 3, 2, 1), ints(0, 3, 5, 5, 5), POOL)
    assert s.read.tolist() == [1, 6, NULL, NULL]
    assert s.write.tolist() == [[1, 2, 3], [4, 5, NULL], [NULL] * 3, [NULL] * 3]
    assert s.lengths.tolist() == [3, 2, 0, 0] and not s.same_slots
    s.validate()


def test_vllm_spec_accepts_longer_padded_metadata():
    s = from_vllm_spec(ints(1, 2).view(1, 2), ints(2, 1, 1), ints(0, 2, 2, 2), POOL)
    assert s.read.tolist() == [2] and s.cu_seqlens.tolist() == [0, 2]


@pytest.mark.parametrize("accepted", [0, -5, 4, 2**31 - 1])
def test_impossible_accepted_counts_skip_the_row_or_raise(accepted):
    args = ints(1, 2, 3, 4, 5, 6).view(2, 3), ints(accepted, 2), ints(0, 3, 6), POOL
    assert from_vllm_spec(*args).read.tolist() == [NULL, 5]
    with pytest.raises(SlotsError, match=f"num_accepted: found {accepted}"):
        from_vllm_spec(*args, check=True)


def test_rows_longer_than_their_slots_skip_or_raise():
    args = ints(1, 2, 3, 4).view(2, 2), ints(1, 1), ints(0, 3, 4), POOL
    assert from_vllm_spec(*args).read.tolist() == [NULL, 3]
    with pytest.raises(SlotsError, match="query_start_loc: found 3"):
        from_vllm_spec(*args, check=True)


@pytest.mark.parametrize(
    ("rule", "live"),
    [
        (NullRule.BLOCK_ZERO, [False, False, True, True, False]),
        (NullRule.NEGATIVE, [False, True, True, True, False]),
        (NullRule.NEGATIVE_OR_LAST, [False, True, True, False, False]),
    ],
)
def test_null_rules(rule, live):
    index = torch.tensor([-1, 0, 1, 15, 16])
    assert Slots(index, index, POOL, rule, True).is_live(index).tolist() == live


def test_sglang():
    s = from_sglang(ints(0, 5, -1), POOL)
    assert s.same_slots and s.is_live(s.read).tolist() == [False, True, False]
    s = from_sglang(ints(0, 5, 15), POOL, write_indices=ints(1, 2, 15), sentinel=True)
    assert not s.same_slots and s.is_live(s.write).tolist() == [True, True, False]
    s = from_sglang(ints(3, 4), POOL, query_start_loc=ints(0, 2, 4))
    assert s.lengths.tolist() == [2, 2]


def test_validate_finds_what_kernels_may_not_get():
    def slots(read, write, cu=None):
        read, write = torch.tensor(read), torch.tensor(write)
        return Slots(read, write, POOL, NullRule.NEGATIVE, False, None if cu is None else torch.tensor(cu))

    slots([1, 2, -1, -1], [3, 4, -1, -1]).validate()
    slots([1, 2], [1, 2]).validate()
    with pytest.raises(SlotsError, match="written more than once"):
        slots([1, 2], [3, 3]).validate()
    with pytest.raises(SlotsError, match="row 1 writes slot 1, which row 0 reads"):
        slots([1, 2], [3, 1]).validate()
    with pytest.raises(SlotsError, match="below the pool size 16"):
        slots([1, 16], [1, 2]).validate()
    with pytest.raises(SlotsError, match="never decrease"):
        slots([1, 2], [1, 2], [0, 3, 2]).validate()
    with pytest.raises(SlotsError, match="at most 2 tokens"):
        slots([1], [[1, 2]], [0, 3]).validate()


def test_constructor_errors():
    good = torch.tensor([1])
    with pytest.raises(SlotsError, match="torch.int64"):
        Slots(good.int(), good, POOL, NullRule.NEGATIVE, False)
    with pytest.raises(SlotsError, match=r"read \[n\]"):
        Slots(good, torch.tensor([1, 2]), POOL, NullRule.NEGATIVE, False)
    with pytest.raises(SlotsError, match="same_slots"):
        Slots(good, good[:, None], POOL, NullRule.NEGATIVE, True)
    with pytest.raises(SlotsError, match="order"):
        PoolLayout(1, 1, "KK")


def test_kv_pools_are_viewed_not_copied():
    pool = torch.arange(2 * 3 * 4 * 8.0).view(2, 3 * 4 * 8)[:, : 3 * 4 * 8].view(2, 3, 4, 8)
    view = PoolLayout.of(pool, "KV").view(pool)
    assert view.shape == pool.shape and view.data_ptr() == pool.data_ptr()
    assert torch.equal(view[1, 2], pool[1, 2].reshape(8, 4).T)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_spec_rows_property(data):
    rows, columns = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    accepted = data.draw(st.lists(st.integers(-1, columns + 1), min_size=rows, max_size=rows))
    index = torch.randperm(rows * columns).view(rows, columns).int() + 1
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    s = from_vllm_spec(index, torch.tensor(accepted, dtype=torch.int32), cu, PoolLayout(64, 1)).validate()
    for row in range(rows):
        ok = lengths[row] > 0 and 1 <= accepted[row] <= columns
        assert s.read[row] == (index[row, accepted[row] - 1] if ok else NULL)
        assert s.write[row].tolist() == index[row, : lengths[row]].tolist() + [NULL] * (columns - lengths[row])


def test_nothing_synchronises():
    """Fake tensors refuse .item(): what runs on them can run in graph capture."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        index, one, cu = (torch.empty(s, dtype=torch.int32) for s in ((4, 3), (4,), (5,)))
        from_vllm_decode(one, 3, POOL)
        from_vllm_spec(index, one, cu, POOL)
        from_sglang(one, POOL, write_indices=index, query_start_loc=cu)
