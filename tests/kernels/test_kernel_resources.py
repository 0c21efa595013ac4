"""The compiled kernels against the table: nothing may need more of the machine, or narrower accesses, unnoticed."""

import pytest
import resources

from moe_backend_plugin.moe import tactics

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
    assert {row["family"] for row in found.values()} == resources.FAMILIES.keys()


# --- what no renewal of the table may give up -----------------------------------------------------------------------------


def of(found, *families):
    return {name: row for name, row in found.items() if row["family"] in families}


def short_of(rows, **allowed):
    """The rows with another value than allowed (a number, or a range), as text."""
    wrong = []
    for name, row in rows.items():
        for column, values in allowed.items():
            if row[column] not in (values if isinstance(values, range) else (values,)):
                wrong.append(f"{name}: {column}: found {row[column]}, allowed {values}")
    return wrong


LONG_STAGES = "tile_tokens=144, row_groups=2, k_groups=1, row_blocks=2, stages=4"
"""Tiles of 144 tokens in stages of two blocks: too long for the heuristic, but a tuner measured them faster all the same (a few registers
are spilled at a tile's end), and so they may come from the tuned table."""


def test_nothing_spills_that_the_heuristic_chooses(found):
    kept = {name: row for name, row in found.items() if LONG_STAGES not in name}
    assert not short_of(kept, spills=0)
    assert not short_of({name: row for name, row in kept.items() if "local_accesses" in row}, local_accesses=0)
    assert not short_of({name: row for name, row in found.items() if name not in kept}, spills=range(33))


def test_state_moves_in_full_width(found):
    rows = of(found, "gdn_decode")
    assert not short_of(rows, load_bits=range(128, 257))
    assert not short_of({name: row for name, row in rows.items() if "write=none" not in row["variant"]}, store_bits=range(128, 257))


def test_weights_come_in_bulk_copies_and_tokens_in_16_bytes(found):
    assert not short_of(of(found, "moe_gemm"), bulk_copies=range(1, 100), token_copies_128=range(1, 100), lds_128=range(2, 100))


def test_tensor_cores_multiply_and_wait_for_four_at_a_time(found):
    rows = of(found, "moe_gemm")
    by_warp = {name: row for name, row in rows.items() if "warp_mma=True" in row["variant"]}
    together = {name: row for name, row in rows.items() if name not in by_warp}
    assert by_warp and not short_of(by_warp, hgmma=0, hmma=range(8, 100))
    assert not short_of(together, hmma=0, hgmma=range(8, 100))
    assert not short_of(together, hgmma_per_arrive=4)


def test_shared_memory_fits(found):
    """As many blocks on a multiprocessor as the host launches, and no more than the variant says."""
    tuned = {shape for *_, found in resources.tuned() for tactic in found for shape in (tactic.gate_up, tactic.down)}
    launched = {*tactics.SHIPPED, *tuned}
    for job in (job for job in resources.jobs() if job[0] == "moe_gemm"):
        variant, row = job[1], found[resources.key(resources.row_of(job))]
        system = 1024  # of every block
        (blocks,) = {
            shape.blocks
            for shape in launched
            if (shape.tile_tokens, shape.rows, shape.k_groups, shape.stages)
            == (variant.tile_tokens, variant.rows, variant.k_groups, variant.stages)
        }
        assert row["shared_bytes"] * blocks <= 228 << 10, resources.key(row)
        assert row["shared_bytes"] - system <= variant.shared_bytes, resources.key(row)


def test_rows_are_read_16_bytes_at_a_time(found):
    assert not short_of(of(found, "moe_combine"), load_bits=128, store_bits=range(64, 129))
    routes = of(found, "moe_route")
    assert not short_of({name: row for name, row in routes.items() if "method=count" not in name}, store_bits=128)
    assert not short_of({name: row for name, row in routes.items() if "index=int64" in name}, load_bits=64)


# --- the table itself -----------------------------------------------------------------------------------------------------


def test_differences_are_named_with_both_values():
    row = {"family": "f", "variant": "x=1", "architecture": "sm_90a"}
    kept = row | {"registers": 80, "spills": 0, "shared_bytes": 64, "load_bits": 128, "store_bits": 128}
    worse, better = resources.differences(kept | {"registers": 96, "load_bits": 64, "shared_bytes": 0}, kept)
    assert worse == ["f [x=1] sm_90a: registers: found 96, table 80", "f [x=1] sm_90a: load_bits: found 64, table 128"]
    assert better == ["f [x=1] sm_90a: shared_bytes: found 0, table 64"]
    assert resources.differences(kept, kept) == ([], [])


@pytest.mark.parametrize(
    ("column", "worse", "better"),
    [
        ("registers", 129, 120),
        ("spills", 8, 0),
        ("local_accesses", 9, 1),
        ("shared_bytes", 2049, 2047),
        ("bulk_copies", 1, 3),
        ("token_copies_128", 1, 3),
        ("lds_128", 1, 3),
        ("hmma", 1, 3),
        ("hgmma", 1, 3),
        ("hgmma_per_arrive", 1, 8),
    ],
)
def test_which_way_is_worse(column, worse, better):
    kept = {"family": "moe_gemm", "variant": "default", "architecture": "sm_90a"}
    kept |= {"registers": 128, "spills": 4, "local_accesses": 2, "shared_bytes": 2048, "bulk_copies": 2, "token_copies_128": 2}
    kept |= {"lds_128": 2, "hmma": 2, "hgmma": 2, "hgmma_per_arrive": 4}
    text = f"moe_gemm [default] sm_90a: {column}: found"
    assert resources.differences(kept | {column: worse}, kept) == ([f"{text} {worse}, table {kept[column]}"], [])
    assert resources.differences(kept | {column: better}, kept) == ([], [f"{text} {better}, table {kept[column]}"])


def test_columns_must_be_the_same():
    row = {"family": "f", "variant": "x=1", "architecture": "sm_90a", "registers": 80}
    assert resources.differences(row | {"hmma": 8}, row) == (["f [x=1] sm_90a: hmma: found 8, not in the table"], [])
    assert resources.differences(row, row | {"hmma": 8}) == (["f [x=1] sm_90a: hmma: in the table, but measured no more"], [])
