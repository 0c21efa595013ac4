"""The compiled kernels against the table: nothing may need more of the machine, or narrower accesses, unnoticed."""

import pytest
import resources

REASON = resources.missing()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=REASON or ""), pytest.mark.timeout(900)]
RENEW = "python tests/kernels/resources.py --renew"
KEPT = resources.read_table()


@pytest.fixture(scope="module")
def found():
    return {resources.key(row): row for row in resources.measure_all()}


@pytest.mark.parametrize("name", KEPT)
def test_no_row_is_worse(found, name, capsys):
    assert name in found, f"{name}: in the table, but compiled no more; {RENEW}"
    worse, better = resources.differences(found[name], KEPT[name])
    if better and not worse:
        with capsys.disabled():
            print(f"\nbetter than the table, which asks for {RENEW}:", *better, sep="\n  ")
    assert not worse, "\n".join(worse)


def test_table_has_all_rows(found):
    assert not found.keys() - KEPT.keys(), f"not in the table; {RENEW}"


def test_state_moves_in_full_width_and_nothing_spills(found):
    """What no renewal of the table may give up."""
    for name, row in found.items():
        assert row["load_bits"] >= 128, f"{name}: load_bits: found {row['load_bits']}, allowed 128"
        assert row["store_bits"] >= 128 or "write=none" in row["variant"], f"{name}: store_bits: found {row['store_bits']}, allowed 128"
        assert row["spills"] == 0, f"{name}: spills: found {row['spills']}, allowed 0"


def test_differences_are_named_with_both_values():
    row = {"family": "f", "variant": "x=1", "architecture": "sm_90a"}
    kept = row | {"registers": 80, "spills": 0, "shared_bytes": 64, "load_bits": 128, "store_bits": 128}
    worse, better = resources.differences(kept | {"registers": 96, "load_bits": 64, "shared_bytes": 0}, kept)
    assert worse == ["f [x=1] sm_90a: registers: found 96, table 80", "f [x=1] sm_90a: load_bits: found 64, table 128"]
    assert better == ["f [x=1] sm_90a: shared_bytes: found 0, table 64"]
    assert resources.differences(kept, kept) == ([], [])
