"""Per-token routing dumps of other programs as our frames: SGLang, vLLM, OLMoE's analysis scripts.

    dumps = read_vllm("outputs.jsonl")                       # or read_sglang, read_sglang_recorder, read_olmoe
    tokens, routing = dump_frames(dumps, n_experts=128, tokenizer=tokenizer, labels=labels)

These programs keep the chosen experts, in the order of their top-k, and nothing else: weights, entropies, margins and
norms are null, so that the statistics of load, contrasts, information, dynamics and co-activation work and those of
margins and contribution do not. Formats as in the sources of SGLang 0.5, vLLM 0.11 to 0.24 and allenai/OLMoE.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from workbench.axes import ROUTING_COLUMNS, TOKEN_COLUMNS
from workbench.chat import label_tokens
from workbench.errors import RunError
from workbench.interop.dump_files import as_array, as_ids, decode, read_lines
from workbench.io.prompts import split_of
from workbench.io.run_checks import ROUTING_SCHEMA, TOKEN_SCHEMA
from workbench.io.token_class import places, token_classes, word_starts
from workbench.io.tokens import Tokenizer

LABELS = ("group_id", "topic", "lang", "script", "effort")
EXTEND = 1  # SGLang's ForwardMode of a prefill


@dataclass(frozen=True)
class Dump:
    """One sequence: its token ids, how many of these were the prompt, and experts [row layer k] of consecutive tokens.

    Row i belongs to token start + i. Servers never run the last token they wrote, so it usually has no row.
    """

    doc_id: str
    ids: tuple[int, ...]
    n_prompt: int
    expert_ids: np.ndarray
    start: int = 0


def read_olmoe(path: str | Path) -> list[Dump]:
    """JSONL of allenai/OLMoE's run_moe_analysis.py: input_ids [token], exp_ids [token k layer]."""
    dumps: list[Dump] = []
    for where, row in read_lines(Path(path)):
        ids = as_ids(row.get("input_ids"), where, "input_ids")
        experts = as_array(row.get("exp_ids"), where, "exp_ids").transpose(0, 2, 1)  # k and layer change places
        dumps.append(_checked(Dump(f"{Path(path).stem}-{len(dumps):05}", ids, len(ids), experts), where))
    return dumps


def read_sglang(path: str | Path, n_layers: int, k: int) -> list[Dump]:
    """JSONL of SGLang responses asked for with return_routed_experts, one per line, as the server gave them.

    The experts are meta_info.routed_experts (/generate) or sglext.routed_experts (chat completions): base64 of int32
    [token layer k], whose n_layers and k the response does not hold. Token ids: input_ids and output_ids, which the
    caller adds to the line where the server left them out, or meta_info's input_token_logprobs and
    output_token_logprobs.
    """
    dumps: list[Dump] = []
    for where, row in read_lines(Path(path)):
        meta = row.get("meta_info") or {}
        coded = meta.get("routed_experts") or (row.get("sglext") or {}).get("routed_experts")
        flat = decode(coded, "int32", where)
        if flat.size % (n_layers * k):
            raise RunError(
                f"{where}: expected routed_experts of {n_layers} layers x {k} experts, got {flat.size} numbers. "
                "Pass the model's own number of layers and k."
            )
        prompt = row.get("input_ids") or [entry[1] for entry in meta.get("input_token_logprobs") or []]
        answer = row.get("output_ids") or [entry[1] for entry in meta.get("output_token_logprobs") or []]
        ids = as_ids([*prompt, *answer], where, "input_ids and output_ids")
        name = str(meta.get("id") or row.get("id") or f"{Path(path).stem}-{len(dumps):05}")
        start = int(meta.get("routed_experts_start_len") or 0)
        dumps.append(_checked(Dump(name, ids, len(prompt), flat.reshape(-1, n_layers, k), start), where))
    return dumps


def read_vllm(path: str | Path) -> list[Dump]:
    """JSONL of vLLM outputs: prompt_token_ids, token_ids, routed_experts [token layer k], optionally request_id.

    The fields are those of RequestOutput and CompletionOutput (engine argument enable_return_routed_experts),
    routed_experts as nested lists or as {"data": base64, "shape": [...], "dtype": "int32"}. For objects in memory see
    `from_vllm`.
    """
    dumps: list[Dump] = []
    for where, row in read_lines(Path(path)):
        prompt = as_ids(row.get("prompt_token_ids"), where, "prompt_token_ids")
        ids = (*prompt, *as_ids(row.get("token_ids"), where, "token_ids"))
        name = str(row.get("request_id") or f"{Path(path).stem}-{len(dumps):05}")
        experts = as_array(row.get("routed_experts"), where, "routed_experts")
        dumps.append(_checked(Dump(name, ids, len(prompt), experts), where))
    return dumps


def from_vllm(outputs: Iterable[Any]) -> list[Dump]:
    """vllm.RequestOutput objects, as LLM.generate returns them; every completion of a request is a sequence."""
    dumps: list[Dump] = []
    for request in outputs:
        for number, completion in enumerate(request.outputs):
            where = f"request {request.request_id}"
            ids = (*map(int, request.prompt_token_ids), *map(int, completion.token_ids))
            name = str(request.request_id) if len(request.outputs) == 1 else f"{request.request_id}-{number}"
            experts = as_array(completion.routed_experts, where, "routed_experts")
            dumps.append(_checked(Dump(name, ids, len(request.prompt_token_ids), experts), where))
    return dumps


def read_sglang_recorder(path: str | Path, k: int = 8) -> tuple[list[Dump], int]:
    """A .pt dump of SGLang's expert distribution recorder in mode per_token: (sequences, number of tokens left out).

    records: one per forward pass, with input_ids, positions, extend_seq_lens, forward_mode and topk_ids_of_layer [layer
    token 8]. A pass does not say which request a token belongs to, so only whole prompts can be put together: prefills
    whose positions run from 0. Decode steps, and prefills that continue a cached or chunked prompt, are counted and
    left out. Use it without redundant experts, when physical and logical ids are the same. Reads no pickled code.
    """
    where = str(path)
    try:
        records = torch.load(path, map_location="cpu", weights_only=True)["records"]
    except Exception as error:  # torch raises many kinds for what it cannot read
        reason = str(error).splitlines()[0]
        raise RunError(f"{where}: expected a recorder dump with records, got {reason}. Dump it again.") from None
    dumps: list[Dump] = []
    left_out = 0
    for record in records:
        for ids, experts in _prefills(record, where):
            if ids is None:
                left_out += len(experts)
                continue
            if experts.shape[-1] < k or (experts[..., k:] >= 0).any():
                filled = int((experts >= 0).any((0, 1)).sum())
                raise RunError(
                    f"{where}: expected {k} experts per token and layer, got {filled} of {experts.shape[-1]} places "
                    "filled. Pass the model's own k; the recorder keeps 8 at most."
                )
            name = f"{Path(path).stem}-{len(dumps):05}"
            dumps.append(_checked(Dump(name, ids, len(ids), experts[..., :k]), where))
    return dumps, left_out


def _prefills(record: Mapping[str, Any], where: str) -> Iterator[tuple[tuple[int, ...] | None, np.ndarray]]:
    """(token ids, experts [token layer 8]) of each sequence of a pass; None for the ids when it is no whole prompt."""
    try:
        ids, positions, lengths = record["input_ids"], record["positions"], record["extend_seq_lens"]
        experts = np.asarray(record["topk_ids_of_layer"]).transpose(1, 0, 2)  # [token layer 8]
        mode = record["forward_mode"]
    except (KeyError, ValueError, TypeError) as error:
        raise RunError(
            f"{where}: expected a record of mode per_token, got none for {error}. Record it again."
        ) from None
    if mode != EXTEND or lengths is None:
        yield None, experts
        return
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        whole = list(positions[part]) == list(range(length))
        yield (tuple(map(int, ids[part])) if whole else None), experts[part]
        start += length
    yield None, experts[start:]  # padding of the pass, or tokens whose sequence it does not name


def dump_frames(
    dumps: Sequence[Dump], n_experts: int, tokenizer: Tokenizer | None = None, labels: pl.DataFrame | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(tokens, routing) with axes.TOKEN_COLUMNS and axes.ROUTING_COLUMNS, of the tokens that have routing.

    labels: doc_id and any of group_id, topic, lang, script, effort; a document without a group is a group of its own.
    With a `tokenizer` tokens get text, class, and their Harmony segment; without one they are "plain" and have no
    class. Raises RunError for an expert id outside 0 .. n_experts - 1, for two sequences of one name, and for labels
    that fit none.
    """
    names = [dump.doc_id for dump in dumps]
    if len(set(names)) < len(names):
        raise RunError("dumps: expected one name per sequence, got the same twice. Give them distinct request ids.")
    shapes = {dump.expert_ids.shape[1:] for dump in dumps}
    if len(shapes) != 1:
        raise RunError(f"dumps: expected one number of layers and k, got {sorted(shapes)}. Import one model at a time.")
    highest = max(int(dump.expert_ids.max(initial=0)) for dump in dumps)
    if highest >= n_experts:
        raise RunError(f"dumps: expected experts 0 to {n_experts - 1}, got {highest}. Pass the model's n_experts.")
    tokens = pl.concat([_token_rows(dump, tokenizer) for dump in dumps])
    return _labelled(tokens, labels, names), pl.concat([_routing_rows(dump) for dump in dumps])


def _token_rows(dump: Dump, tokenizer: Tokenizer | None) -> pl.DataFrame:
    n, ids = len(dump.ids), list(dump.ids)
    segments = ["plain"] * n if tokenizer is None else label_tokens(ids, tokenizer)
    frame = pl.DataFrame(
        {
            "doc_id": [dump.doc_id] * n,
            "pos": range(n),
            "token_id": ids,
            "token": list(map(str, ids)) if tokenizer is None else tokenizer.to_str_tokens(ids),
            "token_class": None if tokenizer is None else token_classes(ids, tokenizer),
            "word_initial": None if tokenizer is None else word_starts(ids, tokenizer),
            "segment": segments,
            "phase": ["prefill"] * dump.n_prompt + ["decode"] * (n - dump.n_prompt),
        },
        schema_overrides={name: TOKEN_SCHEMA[name] for name in ("pos", "token_id", "token_class", "word_initial")},
    )
    return frame.hstack(places(frame["segment"]))[dump.start : dump.start + len(dump.expert_ids)]


def _labelled(tokens: pl.DataFrame, labels: pl.DataFrame | None, names: Sequence[str]) -> pl.DataFrame:
    given = pl.DataFrame({"doc_id": names}) if labels is None else labels
    unknown = sorted(set(given.columns) - {"doc_id", *LABELS})
    if "doc_id" not in given.columns or unknown or given["doc_id"].is_duplicated().any():
        raise RunError(f"labels: expected doc_id once each and some of {', '.join(LABELS)}, got {given.columns}.")
    missing = sorted(set(names) - set(given["doc_id"]))
    if missing:
        raise RunError(f"labels: expected every sequence, got none for {missing[0]}. Add it, or import fewer.")
    absent = [pl.lit(None, dtype=pl.String).alias(name) for name in LABELS if name not in given.columns]
    full = given.with_columns(absent).with_columns(pl.col("group_id").fill_null(pl.col("doc_id")))
    splits = {group: split_of(group) for group in full["group_id"].unique()}
    full = full.with_columns(split=pl.col("group_id").replace_strict(splits, return_dtype=pl.String))
    joined = tokens.join(full, on="doc_id", maintain_order="left")
    return joined.select(pl.col(name).cast(TOKEN_SCHEMA[name]) for name in TOKEN_COLUMNS)


def _routing_rows(dump: Dump) -> pl.DataFrame:
    n, n_layers, k = dump.expert_ids.shape
    frame = pl.DataFrame(
        {
            "doc_id": [dump.doc_id] * (n * n_layers),
            "pos": np.repeat(np.arange(dump.start, dump.start + n, dtype=np.int32), n_layers),
            "layer": np.tile(np.arange(n_layers, dtype=np.int16), n),
            "expert_ids": pl.Series(dump.expert_ids.astype(np.int16).reshape(-1, k)).arr.to_list(),
        }
    )
    absent = [pl.lit(None).alias(name) for name in ROUTING_COLUMNS if name not in frame.columns]
    return frame.with_columns(absent).select(pl.col(name).cast(ROUTING_SCHEMA[name]) for name in ROUTING_COLUMNS)


def _checked(dump: Dump, where: str) -> Dump:
    """Raises RunError unless rows fit the tokens and every row names k different experts."""
    experts, rest = dump.expert_ids, len(dump.ids) - dump.start
    if experts.ndim != 3 or len(experts) not in (rest, rest - 1):
        raise RunError(
            f"{where}: expected experts [token layer k] of {rest} tokens, or one less (the last is never run), "
            f"got shape {experts.shape}. The ids and the experts are not of one sequence."
        )
    ordered = np.sort(experts, axis=-1)
    broken = (ordered[..., 0] < 0) | (ordered[..., 1:] == ordered[..., :-1]).any(-1)  # [token layer]
    if broken.any():
        token, layer = np.argwhere(broken)[0]
        raise RunError(
            f"{where}: expected {experts.shape[-1]} different experts for token {dump.start + token} in layer {layer}, "
            f"got {experts[token, layer].tolist()}. Rows of zeros or -1 were never filled: check k, and record again."
        )
    return dump
