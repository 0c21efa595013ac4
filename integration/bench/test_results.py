"""Stored figures of GPU kernels speak of the kernels in this tree, or they are measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_backend_plugin.bench.stamp import kernel_hash

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "integration" / "bench" / "results").glob("*.json"))


def stale(file: Path, tree: str | None = None) -> str | None:
    """What to do about a result of another kernel than the tree's, or None; results without a kernel hash are of no kernel."""
    stamp = json.loads(file.read_text(encoding="utf-8"))["stamp"]
    found = stamp.get("kernel_hash")
    if found is None:
        return None
    tree = tree or kernel_hash(stamp["kernel"])
    if found == tree:
        return None
    shown = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
    return f"{shown}: measured with kernels {found}, the tree has {tree}; on {stamp['device']}: {stamp['command']} --out {shown}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_result_is_of_this_tree(file: Path) -> None:
    message = stale(file)
    assert message is None, message


def test_a_stale_result_is_named(tmp_path: Path) -> None:
    file = tmp_path / "gdn_h200.json"
    file.write_text(
        json.dumps({"stamp": {"kernel": "gdn_decode", "kernel_hash": "old", "device": "NVIDIA H200", "command": "moe-backend bench gdn"}})
    )
    assert stale(file, "old") is None
    message = stale(file, "new")
    assert all(word in message for word in ("gdn_h200.json", "old", "new", f"moe-backend bench gdn --out {file}"))


def test_a_result_of_several_kernels_is_stale_once_one_of_them_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_backend_plugin.bench import stamp
    from moe_backend_plugin.bench.moe import KERNELS

    sources = dict.fromkeys(KERNELS, "old")
    monkeypatch.setattr(stamp, "source_hash", sources.__getitem__)
    file = tmp_path / "moe_h200.json"
    measured = {
        "kernel": list(KERNELS),
        "kernel_hash": stamp.kernel_hash(KERNELS),
        "device": "NVIDIA H200",
        "command": "moe-backend bench moe",
    }
    file.write_text(json.dumps({"stamp": measured, "ceilings": {}, "rows": []}))
    assert stale(file) is None
    sources["moe_route"] = "new"
    assert f"moe-backend bench moe --out {file}" in stale(file)
