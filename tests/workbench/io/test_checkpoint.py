"""Directories and files that are no whole checkpoint: each is refused with what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.checkpoints import edit_json
from workbench.errors import CheckpointError
from workbench.io import checkpoint
from workbench.io.weights import load_model

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: the index names it, but there is no such file"):
        load_model(sharded)


@pytest.mark.parametrize("keep", [0, 4, 2000, -1])
def test_a_truncated_shard_is_named(sharded: Path, keep: int) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{shard.name}: expected a whole safetensors file, got (.|\n)*truncated"):
        load_model(sharded)


def test_index_and_shards_must_agree(sharded: Path) -> None:
    index = sharded / checkpoint.INDEX_FILE
    first, second, *_ = sorted(file.name for file in sharded.glob("*.safetensors"))
    moved = next(name for name, file in json.loads(index.read_text())["weight_map"].items() if file == first)
    edit_json(index, lambda i: i["weight_map"].update({moved: second}))
    with pytest.raises(CheckpointError, match="shards that agree with their index, got 2 problems") as caught:
        load_model(sharded)
    assert f"{moved}: {first} holds it, but the index places it in {second}" in str(caught.value)
    assert f"{moved}: the index places it in {second}, which does not hold it" in str(caught.value)
    edit_json(index, lambda i: i["weight_map"].pop(moved))
    with pytest.raises(CheckpointError, match=f"{moved}: {first} holds it, but the index does not list it"):
        load_model(sharded)


def test_an_index_cannot_point_outside_its_directory(sharded: Path) -> None:
    edit_json(
        sharded / checkpoint.INDEX_FILE, lambda i: i["weight_map"].update({Q_PROJ: "../one_file/model.safetensors"})
    )
    with pytest.raises(CheckpointError, match=r"a shard is a \.safetensors file beside the index"):
        load_model(sharded)


def test_an_index_cannot_name_what_no_file_is_called(sharded: Path) -> None:
    edit_json(sharded / checkpoint.INDEX_FILE, lambda i: i["weight_map"].update({Q_PROJ: f"{'x' * 5000}.safetensors"}))
    with pytest.raises(CheckpointError, match="the index names it, but there is no such file"):
        load_model(sharded)


def test_an_index_without_a_map_is_refused(sharded: Path) -> None:
    (sharded / checkpoint.INDEX_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="expected a weight_map of names to files"):
        load_model(sharded)


def test_two_checkpoints_in_one_directory_are_refused(one_file: Path, sharded: Path) -> None:
    shutil.copyfile(one_file / "model.safetensors", sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"got both\. Remove the one that is out of date"):
        load_model(sharded)


def test_shards_without_their_index_are_refused(sharded: Path) -> None:
    (sharded / checkpoint.INDEX_FILE).unlink()
    with pytest.raises(CheckpointError, match="got other safetensors files only"):
        load_model(sharded)


def test_shards_beside_a_whole_checkpoint_are_named(one_file: Path, sharded: Path) -> None:
    for directory, match in [
        (one_file, r"expected model\.safetensors alone, got extra\.safetensors beside it"),
        (sharded, r"extra\.safetensors: lies beside the index, which does not name it"),
    ]:
        shutil.copyfile(next(directory.glob("*.safetensors")), directory / "extra.safetensors")
        with pytest.raises(CheckpointError, match=match):
            load_model(directory)


def test_pickles_are_never_read(one_file: Path) -> None:
    (one_file / "model.safetensors").rename(one_file / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"expected safetensors, got a pickle\. A pickle can"):
        load_model(one_file)


def test_a_directory_without_weights_is_refused(one_file: Path) -> None:
    (one_file / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model.safetensors, got no weights"):
        load_model(one_file)


def test_config_json_must_be_a_readable_object(one_file: Path) -> None:
    for text, match in [
        ("{", "expected readable JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"hidden_size": 64, "hidden_size": 32}', "expected readable JSON, got 'hidden_size' more than once"),
        ("[" * 100_000, "expected readable JSON, got maximum recursion depth"),
    ]:
        (one_file / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=match):
            load_model(one_file)
    (one_file / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: expected a file, got none"):
        load_model(one_file)
