"""Checkpoints in: Hugging Face safetensors directories, streamed into our models."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from workbench.config import ModelConfig
from workbench.errors import CheckpointError, HookError
from workbench.hf_config import config_from_hf
from workbench.hooks import as_device
from workbench.io.checkpoint import (
    FLOAT_DTYPES,
    GENERATION_FILE,
    MAX_LISTED,
    StoredTensor,
    raise_problems,
    read_headers,
    read_json,
    read_template,
    stream,
)
from workbench.io.hub import resolve
from workbench.io.names import TIED_HEAD, Slot, ignorable, layout_of, slot_part, slots
from workbench.io.quantise import ErrorTally, store_piece
from workbench.io.tokens import Tokenizer
from workbench.models import Llama, build_model
from workbench.models.moe_weights import QuantizedWeight

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES.values()}


def load_model(
    path_or_name: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    moe_impl: str = "auto",
    router_dtype: str = "float32",
    experts: str = "plain",
    progress: bool = True,
) -> Llama:
    """Load a checkpoint: a bundled model, a directory, a family name or a hub id, see `workbench.io.hub.resolve`.

    Weights go shard by shard into the model, whose parameters are allocated once: peak host memory stays within 1.1
    times the model's bytes. dtype "auto" keeps the dtype that the embedding is stored in, with a warning that names the
    tensors this rounds. The model comes with `tokenizer` and `chat_template` (None when the checkpoint has none),
    `stop_ids` and `source`.

    experts "int8" or "int4" quantises them as they are read; `model.expert_errors` has the error of each expert, see
    `workbench.io.quantise`. moe_impl "auto" then is triton where that runs.

    Raises CheckpointError naming every missing, extra, wrong-shaped, wrong-dtype or non-finite tensor, every stray
    shard and every unreadable file beside the weights, and ConfigError for a model that is not implemented.
    """
    directory = resolve(path_or_name)
    cfg = _read_config(directory)
    unread = ignorable(cfg)
    stored = {name: tensor for name, tensor in read_headers(directory).items() if name not in unread}
    table = slots(cfg, layout_of(stored))
    _check_headers(directory, cfg, table, stored)
    resolved = FLOAT_DTYPES[stored["model.embed_tokens.weight"].dtype] if dtype == "auto" else _as_dtype(dtype)
    kinds = {"moe_impl": moe_impl, "router_dtype": router_dtype, "experts": experts}
    model = build_model(cfg, dtype=resolved, device=_as_device(device), **kinds)
    if dtype == "auto":
        _warn_of_rounding(model, table, stored)
    _attach(model, directory, str(path_or_name))
    _fill(model, directory, table, stored, progress)
    return model


def _read_config(directory: Path) -> ModelConfig:
    hf = read_json(directory / "config.json")
    quantized = hf.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unnamed") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            f"{directory}: expected plain weights, got quantization_config ({method}). "
            "Load the checkpoint it was made from."
        )
    return config_from_hf(hf)


def _check_headers(
    directory: Path, cfg: ModelConfig, table: Mapping[str, Slot], stored: Mapping[str, StoredTensor]
) -> None:
    """Compare what the shards hold with what the model needs, before any memory is spent on it."""
    skeleton = dict(build_model(cfg, device="meta").named_parameters())
    shapes = {name: tuple(slot_part(skeleton, slot).shape) for name, slot in table.items()}
    if cfg.tie_embeddings and TIED_HEAD in stored:
        shapes[TIED_HEAD] = tuple(skeleton["embed.weight"].shape)
    problems = [f"{name}: missing" for name in shapes if name not in stored]
    problems += [f"{name}: not part of this model" for name in stored if name not in shapes]
    for name in shapes.keys() & stored.keys():
        if stored[name].dtype not in FLOAT_DTYPES:
            problems.append(f"{name}: dtype {stored[name].dtype}, not one of {', '.join(FLOAT_DTYPES)}")
        if stored[name].shape != shapes[name]:
            problems.append(f"{name}: shape {list(stored[name].shape)}, not {list(shapes[name])}")
    if problems:
        advice = "The config.json belongs to another model, or the checkpoint is incomplete."
        raise_problems(directory, f"the {len(shapes)} tensors of its config.json", sorted(problems), advice)


def _warn_of_rounding(model: Llama, table: Mapping[str, Slot], stored: Mapping[str, StoredTensor]) -> None:
    """Name the tensors that do not fit into the model's dtype; quantised experts are made of what is stored."""
    params = dict(model.named_parameters())
    kept = {name: FLOAT_DTYPES[stored[name].dtype] for name, slot in table.items() if slot.param in params}
    rounded = [name for name, dtype in kept.items() if torch.promote_types(dtype, model.dtype) != model.dtype]
    if rounded:
        more = f" and {len(rounded) - MAX_LISTED} more" if len(rounded) > MAX_LISTED else ""
        exact = str(reduce(torch.promote_types, kept.values())).removeprefix("torch.")
        warnings.warn(
            f"dtype auto: expected all tensors in the embedding's {model.dtype}, got {len(rounded)} to be "
            f"rounded to it: {', '.join(rounded[:MAX_LISTED])}{more}. Pass dtype={exact!r} to keep them as they are.",
            stacklevel=3,
        )


@torch.no_grad()
def _fill(
    model: Llama,
    directory: Path,
    table: Mapping[str, Slot],
    stored: Mapping[str, StoredTensor],
    progress: bool,
) -> None:
    """Copy every stored tensor into its place, and refuse the whole checkpoint if one holds NaN or infinity."""
    params = dict(model.named_parameters())
    holders = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}
    tally = ErrorTally()
    dtype = model.dtype
    broken: dict[str, None] = {}
    n_bytes = sum(tensor.n_bytes for tensor in stored.values())
    # disable=None shows the bar on a terminal only
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="loading", disable=None if progress else True) as bar:
        for name, rows, piece in stream({name: stored[name] for name in table}):
            cast = piece.to(dtype)
            if not _is_finite(cast):
                broken[f"{name}: holds NaN or infinity as {dtype}"] = None
            elif table[name].param in holders:
                store_piece(holders[table[name].param], table[name], rows, piece, tally)
            else:
                slot_part(params, table[name])[rows].copy_(cast)
            bar.update(piece.nbytes)
        for name, rows, piece in stream({name: stored[name] for name in stored.keys() - table.keys()}):
            # Only a tied head is left: a copy of the embedding, or the config is wrong to tie them.
            if not torch.equal(piece.to(dtype), params["embed.weight"][rows].cpu()):
                broken[f"{name}: differs from model.embed_tokens.weight, which config.json ties it to"] = None
            bar.update(piece.nbytes)
    if broken:
        raise_problems(directory, "finite weights as config.json describes them", list(broken), "Do not use it.")
    if holders:
        model.expert_errors = tally.frame()


def _is_finite(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()  # NaN propagates; no temporary of the tensor's size, unlike isfinite().all()
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _attach(model: Llama, directory: Path, source: str) -> None:
    """Give the model what lies beside its weights."""
    model.source = source
    model.chat_template = read_template(directory)
    has_tokenizer = (directory / "tokenizer.json").is_file()
    model.tokenizer = Tokenizer.from_file(directory / "tokenizer.json") if has_tokenizer else None
    if has_tokenizer and model.tokenizer.d_vocab > model.cfg.d_vocab:
        raise CheckpointError(
            f"{directory}: expected a tokenizer of at most {model.cfg.d_vocab} tokens, got {model.tokenizer.d_vocab}. "
            "Put the model's own tokenizer.json there."
        )
    ends = _read_ends(directory / GENERATION_FILE, model.cfg)
    # <|call|> ends a turn in this family even where a checkpoint's files forget to say so
    family = () if model.tokenizer is None else (model.tokenizer.eos_id, model.tokenizer.call_id)
    model.stop_ids = tuple(dict.fromkeys([*ends, *family]))


def _read_ends(path: Path, cfg: ModelConfig) -> Sequence[int]:
    """The ids that end a generation by generation_config.json, else by config.json."""
    given = read_json(path).get("eos_token_id") if path.is_file() else None
    if given is None:
        return cfg.eos_ids
    ends = given if isinstance(given, list) else [given]
    if not all(type(token_id) is int and 0 <= token_id < cfg.d_vocab for token_id in ends):  # a bool is no id
        raise CheckpointError(
            f"{path}: expected eos_token_id to be null, an id below {cfg.d_vocab} or a list of such ids, "
            f"got {given!r}. Correct it."
        )
    return ends


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in _DTYPES.values():
        raise CheckpointError(f"dtype: expected auto, {', '.join(_DTYPES)}, got {dtype!r}. Choose one of these.")
    return resolved


def _as_device(device: str | torch.device) -> torch.device:
    try:
        found = as_device(device)
    except HookError as error:
        raise CheckpointError(str(error)) from None
    if found.type == "meta":
        raise CheckpointError("device: expected one that holds weights, got 'meta'. Use build_model for a skeleton.")
    return found
