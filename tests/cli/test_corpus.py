"""The text that calibration and verification use."""

from __future__ import annotations

import pytest

from moe_backend_plugin.cli.corpus import standard_library, windows
from moe_backend_plugin.cli.output import InputError


class Letters:
    """One token a character; 0 starts a document."""

    bos_token_id, eos_token_id = 0, 0

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def test_calibration_and_verification_share_no_file():
    first, second = set(standard_library("calibration")), set(standard_library("verification"))
    assert first and second and not first & second
    assert standard_library("calibration") == standard_library("calibration")


def test_windows(tmp_path):
    (tmp_path / "a").write_text("abcdefgh")
    (tmp_path / "b").write_text("ijk")
    files = [tmp_path / "a", tmp_path / "b"]
    a, i = ord("a"), ord("i")
    assert windows(Letters(), files, 4, 9) == [[0, a, a + 1, a + 2], [a + 3, a + 4, a + 5, a + 6], [a + 7, 0, i, i + 1]]
    assert len(windows(Letters(), files, 4, 1)) == 1
    assert windows(Letters(), files, 4, 9, per_file=1) == [[0, a, a + 1, a + 2], [0, i, i + 1, i + 2]]


def test_text_that_is_too_short_or_missing(tmp_path):
    (tmp_path / "a").write_text("abc")
    with pytest.raises(InputError, match="fewer than 5 tokens"):
        windows(Letters(), [tmp_path / "a"], 5, 1)
    with pytest.raises(InputError, match="none"):
        windows(Letters(), [tmp_path / "none"], 5, 1)
