"""Routing frames from a Qwen3-MoE of transformers, for who must keep that model: the same columns as our own capture.

transformers' routers return rows flat over batch and pos, padding included. A recorder watches the model's inputs too,
so that rows find their way back to (sequence, position) and padding is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import polars as pl
import torch
from torch import Tensor

from workbench.capture import Routing
from workbench.errors import ConfigError, RunError, ShapeError
from workbench.models.recording import ROUTING_VALUES, routing_values

try:
    from transformers import Qwen3MoeForCausalLM
except ImportError as error:
    raise ConfigError(
        "transformers: expected the package to be installed, got none. pip install 'llm-jp-4-workbench[hf]'."
    ) from error


def attach(hf_model: Qwen3MoeForCausalLM) -> Recorder:
    """Record the routing of every forward pass, generation included, until `detach` or the end of a `with` block.

    Raises ConfigError for a model that is not transformers' Qwen3-MoE, or has no layer with experts.
    """
    return Recorder(hf_model)


class Recorder:
    """What `attach` returns. Sequences are numbered in order of appearance; a pass without a cache starts new ones.

    A pass that fails midway leaves no trace. Beam search raises RunError, since it moves rows between sequences.

    In generation only tokens that were fed to the model are recorded: the last written one never is, and rows that
    have ended (which transformers keeps feeding with padding) stop at their end token.
    """

    def __init__(self, hf_model: Any) -> None:
        if not isinstance(hf_model, Qwen3MoeForCausalLM):
            raise ConfigError(
                f"hf_model: expected a Qwen3MoeForCausalLM of transformers, got {type(hf_model).__name__}. "
                "Dense models have no routing to record."
            )
        gates = {i: block.mlp.gate for i, block in enumerate(hf_model.model.layers) if hasattr(block.mlp, "gate")}
        if not gates:
            raise ConfigError("hf_model: expected a layer with experts, got dense ones only. Check mlp_only_layers.")
        self.layers = tuple(gates)
        self.n_experts = hf_model.config.num_experts
        self._end_ids = torch.tensor(_as_list(hf_model.generation_config.eos_token_id), dtype=torch.long)
        self._n_sequences = 0
        self._first = 0  # number of the batch's first sequence
        self._places: list[tuple[np.ndarray, np.ndarray]] = []  # per pass: sequence and pos of its kept tokens
        self._found: dict[int, list[tuple[np.ndarray, ...]]] = {layer: [] for layer in gates}
        self._kept = torch.empty(0, dtype=torch.bool)  # [batch pos] of the pass that is running
        self._n_before = 0  # passes before the batch that is running
        self._caches: WeakSet[Any] = WeakSet()  # of transformers, that may not be reordered while we record
        self._running: dict[int, tuple[np.ndarray, ...]] = {}  # by layer, of that pass; kept once it has succeeded
        self._ended = torch.empty(0, dtype=torch.bool)  # [batch]
        self._handles = [
            hf_model.register_forward_pre_hook(self._on_input, with_kwargs=True),
            hf_model.register_forward_hook(self._on_success, with_kwargs=True),
        ]
        for layer, gate in gates.items():
            self._handles.append(gate.register_forward_hook(lambda _m, _i, out, at=layer: self._on_router(at, out)))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def detach(self) -> None:
        """Stop recording; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        for cache in self._caches:
            vars(cache).pop("reorder_cache", None)

    def clear(self) -> None:
        """Forget what was recorded; the next sequence is number 0 again."""
        self._n_sequences = self._first = self._n_before = 0
        self._places.clear()
        for found in self._found.values():
            found.clear()

    def routing(self) -> tuple[Routing, np.ndarray, np.ndarray]:
        """All recorded tokens, sequence after sequence: their Routing, and the sequence and pos [token] of each.

        Raises RunError when nothing was recorded.
        """
        if not self._places:
            raise RunError("recorder: expected a recorded forward pass, got none. Run the model while attached.")
        sequence, pos = (np.concatenate(part) for part in zip(*self._places, strict=True))
        order = np.lexsort((pos, sequence))
        by_layer = [[np.concatenate(part)[order] for part in zip(*self._found[at], strict=True)] for at in self.layers]
        fields = [np.stack(part, axis=1) for part in zip(*by_layer, strict=True)]  # [token layer ...] each
        values = dict(zip(ROUTING_VALUES, fields, strict=True))
        return Routing(self.layers, self.n_experts, **values), sequence[order], pos[order]

    def frame(self, doc_ids: Sequence[str] | None = None) -> pl.DataFrame:
        """One row per (token, layer) with axes.ROUTING_COLUMNS; `doc_ids` names the sequences in order of appearance.

        `pos` counts tokens, not padding. Raises ShapeError when `doc_ids` has another length.
        """
        routing, sequence, pos = self.routing()
        names = [str(number) for number in range(self._n_sequences)] if doc_ids is None else list(doc_ids)
        if len(names) != self._n_sequences:
            raise ShapeError(f"doc_ids: expected one for each of {self._n_sequences} sequences, got {len(names)}.")
        return routing.frame([names[number] for number in sequence], pos.tolist())

    def _on_input(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        shape = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        past = kwargs.get("past_key_values")
        n_past = past.get_seq_length() if past is not None else 0
        if past is not None:
            past.reorder_cache = self._refuse_beams
            self._caches.add(past)
        valid = _valid(mask, shape, n_past)  # bool [batch past+pos]
        pos = (valid.cumsum(1) - 1)[:, n_past:]
        kept = valid[:, n_past:]
        first, ended = self._first, self._ended
        if n_past == 0:
            first, ended = self._n_sequences, torch.zeros(shape[0], dtype=torch.bool)
        elif ids is not None:
            kept = kept & ~ended[:, None]
            ended = ended | torch.isin(ids.cpu(), self._end_ids).any(1)
        self._kept = kept
        self._running.clear()
        rows = torch.arange(first, first + shape[0])[:, None].expand(shape)
        place = rows[kept].numpy(), pos[kept].numpy()
        self._begun = _Pass(place, n_past == 0, first, shape[0], ended)

    def _on_router(self, layer: int, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, weights, ids = (part.detach()[self._kept.flatten().to(part.device)] for part in output)
        values = routing_values(logits, ids, weights).values()
        self._running[layer] = tuple(part.cpu().numpy() for part in values)

    def _on_success(self, _module: Any, _args: tuple[Any, ...], _kwargs: dict[str, Any], _output: Any) -> None:
        """Keep the pass that just ended: one that fails midway never comes here."""
        begun = self._begun
        if begun.is_new:
            self._n_before, self._n_sequences = len(self._places), begun.first + begun.n_rows
        self._first, self._ended = begun.first, begun.ended
        self._places.append(begun.place)
        for layer, values in self._running.items():
            self._found[layer].append(values)

    def _refuse_beams(self, _beams: Tensor) -> None:
        """Forget the batch whose rows are about to move, and say why."""
        self._n_sequences = self._first
        del self._places[self._n_before :]
        for found in self._found.values():
            del found[self._n_before :]
        raise RunError(
            "recorder: expected rows that stay what they are, got beam search, which moves them between sequences. "
            "Generate with num_beams=1, or detach first."
        )


class _Pass(NamedTuple):
    """A forward pass that has begun: where its kept tokens belong, and what the recorder knows once it succeeds."""

    place: tuple[np.ndarray, np.ndarray]  # sequence and pos of each kept token
    is_new: bool  # no cache: its rows are new sequences
    first: int
    n_rows: int
    ended: Tensor  # [batch]


def _valid(mask: Tensor | None, shape: torch.Size, n_past: int) -> Tensor:  # bool [batch past+pos], on the CPU
    if mask is None:
        return torch.ones(shape[0], n_past + shape[1], dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != n_past + shape[1]:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(
            f"attention_mask: expected 1 and 0 of shape ({shape[0]}, {n_past + shape[1]}), got {got}. "
            "Without it, padding cannot be told from tokens."
        )
    return mask.bool().cpu()


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
