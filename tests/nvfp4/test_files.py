"""Missing, truncated and corrupt files of a checkpoint."""

import json
import struct

import pytest
from safetensors.torch import load_file, save_file

from .tiny_checkpoint import build, refused, write


def test_missing_shard(tmp_path):
    write(tmp_path, *build(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "model.safetensors.index.json: ", "model-00002-of-00003.safetensors is missing", "every shard")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, str(tmp_path), "without model-00002-of-00003.safetensors", "all 3 shards")


@pytest.mark.parametrize("keep", [4, 40, -1])
def test_truncated_shard(tmp_path, keep):
    write(tmp_path, *build(), shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(tmp_path, str(shard), "truncated file", "download it again")


def test_bytes_after_the_end(tmp_path):
    write(tmp_path, *build())
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"xyz")
    refused(tmp_path, "model.safetensors", "3 bytes after", "whole safetensors file")


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (b"{" + b" " * 15, "corrupt header"),
        (b"\xff" * 16, "corrupt header"),
        (b"[]", "corrupt header"),
        (json.dumps({"a": {"dtype": "F32", "shape": [2]}}).encode(), "corrupt header"),
        (json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode(), "a with 4 bytes for F32 [2]"),
    ],
)
def test_corrupt_header(tmp_path, header, found):
    write(tmp_path, *build())
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    refused(tmp_path, "model.safetensors", found, "whole safetensors file")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + header)
    refused(tmp_path, "model.safetensors", "corrupt header", "whole safetensors file")


def test_tensor_that_its_shard_lacks(tmp_path):
    write(tmp_path, *build(), shards=2)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    held = load_file(shard)
    name = next(iter(held))
    del held[name]
    save_file(held, shard)
    refused(tmp_path, f"model.safetensors.index.json: {name}", f"no such tensor in {shard.name}", "in the shard that the index names")


def test_a_name_in_two_files(tmp_path):
    tensors, config = build()
    write(tmp_path, tensors, config, shards=2)
    other = tmp_path / "model-00002-of-00002.safetensors"
    save_file(load_file(other) | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]}, other)
    refused(tmp_path, "model.embed_tokens.weight", "two copies", "one")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model-Q4_K_M.gguf", "consolidated.00.pth"])
def test_other_file_formats(tmp_path, file):
    tensors, config = build()
    write(tmp_path, tensors, config)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(b"x")
    refused(tmp_path, str(tmp_path), f"{file} and no *.safetensors", "safetensors files")


def test_empty_folder(tmp_path):
    write(tmp_path, *build())
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, str(tmp_path), "no *.safetensors", "model.safetensors")


def test_broken_index(tmp_path):
    write(tmp_path, *build(), shards=2)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    refused(tmp_path, "weight_map", "list", "mapping of tensor names")
