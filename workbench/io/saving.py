"""Checkpoints out: a model as the Hugging Face safetensors directory that transformers loads back."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from workbench.errors import CheckpointError
from workbench.hf_config import config_to_hf
from workbench.io.checkpoint import GENERATION_FILE, INDEX_FILE, SINGLE_FILE, TEMPLATE_FILE
from workbench.io.names import Layout, slot_part, slots
from workbench.io.permissions import as_any_new_file
from workbench.io.quantise import refuse_quantised
from workbench.models import Llama

_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json")


def save_model(
    model: Llama,
    path: str | os.PathLike[str],
    layout: Layout = "per_expert",
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write `model` to directory `path` as transformers reads it, with its tokenizer and chat template; returns `path`.

    `layout` "per_expert" stores three matrices per expert (transformers 4 and 5), "fused" two stacked tensors per layer
    (transformers 5). The directory appears whole or not at all; an earlier checkpoint there is replaced, any other
    non-empty directory raises CheckpointError.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes: expected a positive size, got {max_shard_bytes}. Give bytes, as 5e9.")
    refuse_quantised(model)
    path = Path(path).expanduser().resolve()
    params = dict(model.named_parameters())
    tensors = {name: slot_part(params, slot).detach() for name, slot in slots(model.cfg, layout).items()}
    with _replacing(path) as directory:
        _save_shards(tensors, directory, max_shard_bytes)
        dtype = str(model.dtype).removeprefix("torch.")
        _write_json(directory / "config.json", {**config_to_hf(model.cfg), "dtype": dtype})
        _save_companions(model, directory)
    return path


def _save_shards(tensors: Mapping[str, Tensor], directory: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE_FILE]
    for file, shard in zip(files, shards, strict=True):
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in shard.items()}, directory / file, {"format": "pt"}
        )
        as_any_new_file(directory / file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _save_companions(model: Llama, directory: Path) -> None:
    """Write what lies beside the weights: tokenizer files, chat template, and the ids that end a generation."""
    if model.tokenizer is not None:
        (directory / "tokenizer.json").write_bytes(model.tokenizer.data)
        beside = Path(model.tokenizer.source).parent
        for name in _TOKENIZER_EXTRAS:
            if (beside / name).is_file():
                shutil.copyfile(beside / name, directory / name)
    if model.chat_template is not None:
        (directory / TEMPLATE_FILE).write_text(model.chat_template, encoding="utf-8")
    ends = {"bos_token_id": model.cfg.bos_id, "eos_token_id": list(model.stop_ids), "pad_token_id": model.cfg.pad_id}
    _write_json(directory / GENERATION_FILE, {key: value for key, value in ends.items() if value not in (None, [])})


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A directory beside `path` that takes its place once it is complete, and vanishes if anything goes wrong."""
    if path.exists() and not _is_ours(path):
        raise CheckpointError(
            f"{path}: expected a new directory or an earlier checkpoint, got something else. Choose another path."
        )
    unique = uuid.uuid4().hex[:8]
    new, old = path.with_name(f".{path.name}.{unique}.new"), path.with_name(f".{path.name}.{unique}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
    except OSError as error:
        raise CheckpointError(f"{path}: expected a place to write, got {error.strerror}. Choose another.") from None
    try:
        yield new
        if path.is_dir():
            path.rename(old)
        new.rename(path)
    finally:
        if old.is_dir() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    """Whether a path holds nothing, or only what a checkpoint consists of, so that replacing it loses nothing else."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir() if entry.suffix != ".safetensors"}
    known = {"config.json", INDEX_FILE, "tokenizer.json", *_TOKENIZER_EXTRAS, TEMPLATE_FILE, GENERATION_FILE}
    return (not names and not any(path.iterdir())) or ("config.json" in names and names <= known)
