"""What an explorer shows, packed: frames in, one JSON-ready dictionary out.

Per document: readable tokens, runs of one segment and phase, and three arrays in base64, little-endian:

    ids      expert ids           [token layer k]        uint8, or uint16 beyond 256 experts
    weights  routing weights      [token layer k]        uint8, in steps of weight_scale / 255
    values   router quantities    [quantity token layer] uint16 between the quantity's low and high; 65535 is missing
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import polars as pl

from workbench.errors import RunError, ShapeError
from workbench.plots.theme import NAMES

FORMAT = 1
MISSING = 65535
QUANTITIES = ("router_entropy", "router_margin")
LABELS = {"router_entropy": ("router entropy", "nats"), "router_margin": ("router margin", "logits")}
TOKEN_COLUMNS = ("doc_id", "group_id", "lang", "effort", "pos", "token_id", "token", "segment", "phase")
ROUTING_COLUMNS = ("doc_id", "pos", "layer", "expert_ids", "routing_weights")


def choose_docs(tokens: pl.DataFrame, max_tokens: int) -> list[str]:
    """The documents of the group of median size among those that fit, the middle effort and Japanese first."""
    sizes = tokens.group_by("group_id").len().filter(pl.col("len") <= max_tokens).sort("len", "group_id")
    if sizes.is_empty():
        raise RunError(
            f"documents: expected a prompt group of at most {max_tokens:,} tokens, got only larger ones. "
            "Pass docs=[...] with few documents, or a larger max_tokens."
        )
    group = sizes["group_id"][len(sizes) // 2]
    return order_docs(tokens.filter(pl.col("group_id") == group))


def order_docs(tokens: pl.DataFrame) -> list[str]:
    """Each document once: those at medium effort first, then low, high and without; within an effort ja before en."""
    heads = tokens.select("doc_id", "lang", "effort").unique("doc_id", keep="first", maintain_order=True)
    efforts, langs = {"medium": 0, "low": 1, "high": 2}, {"ja": 0, "en": 1}
    ranked = sorted(heads.iter_rows(), key=lambda row: (efforts.get(row[2], 3), langs.get(row[1], 2), row[0]))
    return [doc_id for doc_id, _, _ in ranked]


def pack(
    tokens: pl.DataFrame, routing: pl.DataFrame, docs: Sequence[str], n_experts: int, quantities: Sequence[str]
) -> dict[str, Any]:
    """The payload of an explorer over `docs`, in that order.

    `tokens` and `routing` hold at least these documents. Raises ShapeError when a document's routing does not cover
    its tokens in every layer, or holds experts or weights that cannot be.
    """
    layers = routing["layer"].unique().sort().to_list()
    routing = routing.sort("doc_id", "layer", "pos")
    arrays = {doc: _routing_arrays(doc, tokens, routing, layers, n_experts) for doc in docs}
    widths = {ids.shape[-1] for ids, _ in arrays.values()}
    if len(widths) != 1:
        raise ShapeError(f"expert_ids: expected one k, got {sorted(widths)}. Pass documents of one model.")
    scale = max((float(weights.max(initial=0)) for _, weights in arrays.values()), default=1.0) or 1.0
    ranges = [_range(routing, name) for name in quantities]
    return {
        "format": FORMAT,
        "layers": layers,
        "n_experts": n_experts,
        "k": widths.pop(),
        "weight_scale": scale,
        "quantities": ranges,
        "docs": [_pack_doc(doc, tokens, routing, arrays[doc], layers, n_experts, scale, ranges) for doc in docs],
    }


def visible(text: str) -> str:
    """A token as it can be read: line breaks and tabs as signs, other invisible characters by their code."""
    return "".join(map(_visible, text))


def runs(tokens: pl.DataFrame) -> list[tuple[str, str, int]]:
    """Stretches of tokens in one segment and phase, in order: (segment, phase, number of tokens)."""
    pairs = zip(tokens["segment"], tokens["phase"], strict=True)
    return [(segment, phase, len(list(members))) for (segment, phase), members in groupby(pairs)]


def doc_label(row: dict[str, Any]) -> str:
    """What to call a document: its language and effort, and the topic or the id that tells it from others."""
    effort = f", {row['effort']} effort" if row["effort"] else ""
    return f"{NAMES.get(row['lang'], row['lang'])}{effort} · {row['doc_id']}"


def _pack_doc(
    doc: str,
    tokens: pl.DataFrame,
    routing: pl.DataFrame,
    arrays: tuple[np.ndarray, np.ndarray],
    layers: list[int],
    n_experts: int,
    scale: float,
    ranges: list[dict[str, Any]],
) -> dict[str, Any]:
    rows, part = _of(tokens, doc).sort("pos"), _of(routing, doc)
    ids, weights = arrays
    shape = (len(layers), len(rows))
    values = [_quantised(part[entry["name"]], entry).reshape(shape).T for entry in ranges]  # [token layer]
    return {
        **rows.select("doc_id", "group_id", "lang", "effort").row(0, named=True),
        "label": visible(doc_label(rows.row(0, named=True))),  # ids come from prompts
        "tokens": [visible(text) for text in rows["token"]],
        "token_ids": rows["token_id"].to_list(),
        "pos": rows["pos"].to_list(),
        "runs": runs(rows),
        "ids": _base64(ids, "u1" if n_experts <= 256 else "<u2"),
        "weights": _base64(np.rint(weights * (255 / scale)), "u1"),
        "values": _base64(np.stack(values) if values else np.zeros(0), "<u2"),
    }


def _routing_arrays(
    doc: str, tokens: pl.DataFrame, routing: pl.DataFrame, layers: list[int], n_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """(expert ids, routing weights), each [token layer k], checked."""
    pos, part = _of(tokens, doc)["pos"].sort(), _of(routing, doc)
    if len(pos) == 0:
        raise RunError(f"docs: expected document ids of the run, got {doc!r}. See tokens['doc_id'].")
    if part["layer"].to_list() != [layer for layer in layers for _ in pos] or (
        part["pos"].to_list() != pos.to_list() * len(layers)
    ):
        raise ShapeError(
            f"routing of {doc!r}: expected one row for each of {len(pos)} tokens in each of {len(layers)} layers, "
            f"got {len(part)} rows that are not those. Pass tokens and routing of the same run."
        )
    ids, weights = (_cube(doc, part, name, len(layers)) for name in ("expert_ids", "routing_weights"))
    if ids.shape != weights.shape:
        raise ShapeError(f"routing_weights of {doc!r}: expected shape {ids.shape}, got {weights.shape}.")
    if ids.size and not 0 <= ids.min() <= ids.max() < n_experts:
        raise ShapeError(
            f"expert_ids of {doc!r}: expected 0 to {n_experts - 1}, got {ids.min()} to {ids.max()}. Check n_experts."
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ShapeError(f"routing_weights of {doc!r}: expected finite numbers of at least 0, got others.")
    return ids, weights


def _cube(doc: str, part: pl.DataFrame, name: str, n_layers: int) -> np.ndarray:
    """A list column sorted by (layer, pos) as [token layer k]."""
    lengths = part[name].list.len()
    if lengths.n_unique() != 1 or lengths[0] in (None, 0):
        raise ShapeError(f"{name} of {doc!r}: expected lists of one length, got {sorted(lengths.unique().to_list())}.")
    flat = part[name].explode().to_numpy()
    return flat.reshape(n_layers, -1, lengths[0]).transpose(1, 0, 2)


def _of(frame: pl.DataFrame, doc: str) -> pl.DataFrame:
    return frame.filter(pl.col("doc_id") == doc)


def _range(routing: pl.DataFrame, name: str) -> dict[str, Any]:
    values = routing[name].cast(pl.Float64).to_numpy()
    finite = values[np.isfinite(values)]
    label, unit = LABELS.get(name, (name.replace("_", " "), ""))
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return {"name": name, "label": label, "unit": unit, "low": low, "high": high}


def _quantised(column: pl.Series, entry: dict[str, Any]) -> np.ndarray:
    values = column.cast(pl.Float64).to_numpy()
    span = (entry["high"] - entry["low"]) or 1.0
    finite = np.isfinite(values)  # missing and infinite values have no colour
    steps = np.rint((np.where(finite, values, entry["low"]) - entry["low"]) / span * (MISSING - 1))
    return np.where(finite, steps, MISSING)


def _base64(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype(dtype).tobytes()).decode()


_SIGNS = {"\n": "↵\n", "\r": "␍", "\t": "⇥\t", "\u2028": "⟨U+2028⟩", "\u2029": "⟨U+2029⟩"}


def _visible(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    # control, format (bidirectional overrides, zero width) and surrogate characters: unseen, or reorder the page
    return f"⟨U+{ord(character):04X}⟩" if unicodedata.category(character) in ("Cc", "Cf", "Cs") else character
