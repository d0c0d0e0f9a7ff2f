"""What every neuron did in every sequence, counted while the model runs.

A neuron of an expert exists only for tokens that were routed to it, so its counts are conditional on selection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from workbench.capture import pad
from workbench.errors import ShapeError
from workbench.experiments.identity import describe_model, sequences_digest
from workbench.hooks import HookPoint
from workbench.models import Llama
from workbench.models.moe import Moe

Counts = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Activity:
    """What every neuron did in every sequence, by layer; the expert axis has one entry in a dense layer.

    tokens [sequence expert]: how many tokens the expert saw. active [sequence expert neuron]: in how many of them the
    gate was above 0. response, same shape: the sum of silu(gate). langs, groups: of each sequence. settings: plain JSON
    values that say what ran, the model and digests of the sequences and of what was read.
    """

    settings: Mapping[str, Any]
    langs: tuple[str, ...]
    groups: tuple[str, ...]
    sparse: dict[int, bool]
    tokens: dict[int, Counts]
    active: dict[int, Counts]
    response: dict[int, Counts]

    def labels(self, layer: int) -> dict[str, NDArray[Any]]:
        """layer, expert (sparse layers) and neuron of each [expert neuron] cell, flat."""
        n_experts, n_neurons = self.active[layer].shape[1:]
        found = {"layer": np.full(n_experts * n_neurons, layer), "neuron": np.tile(np.arange(n_neurons), n_experts)}
        if self.sparse[layer]:
            found["expert"] = np.repeat(np.arange(n_experts), n_neurons)
        return found


@torch.no_grad()
def neuron_activity(
    model: Llama,
    sequences: Sequence[Sequence[int]],
    langs: Sequence[str],
    groups: Sequence[str],
    *,
    read: Sequence[Sequence[int]] | None = None,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
) -> Activity:
    """Run the sequences and count. `read` are the positions that count (say those of the user's text), all by default.

    `groups` are shared by what says the same thing. Holds 8 · sequence · layer · neuron bytes (per expert in sparse
    layers): for the 32B-A3B choose some `layers`. Raises ShapeError when the lists do not fit.
    """
    read = [range(len(ids)) for ids in sequences] if read is None else read
    if not len(sequences) == len(langs) == len(groups) == len(read) or not sequences:
        raise ShapeError(
            f"sequences: expected as many languages, groups and places to read, got {len(sequences)}, {len(langs)}, "
            f"{len(groups)}, {len(read)}."
        )
    for number, (ids, places) in enumerate(zip(sequences, read, strict=True)):
        outside = [place for place in places if not 0 <= place < len(ids)]
        if outside:  # beyond its end lies padding, which is no token
            raise ShapeError(
                f"read: expected positions from 0 to {len(ids) - 1} in sequence {number}, got {outside[0]}."
            )
    chosen = list(range(model.cfg.n_layers) if layers is None else layers)
    counter = _Counter(model, chosen, len(sequences))
    for start in range(0, len(sequences), batch_size):
        part = slice(start, start + batch_size)
        tokens, mask = pad(sequences[part], left=False)
        kept = torch.zeros_like(tokens, dtype=torch.bool)
        for row, places in zip(kept, read[part], strict=True):
            row[list(places)] = True
        counter.begin(start, kept)
        model.run_with_hooks(
            tokens, attention_mask=mask, stop_at_layer=max(chosen) + 1, fwd_hooks=[(counter.names, counter)]
        )
    sparse = {layer: isinstance(model.blocks[layer].mlp, Moe) for layer in chosen}
    settings = {
        **describe_model(model), "n_sequences": len(sequences), "sequences": sequences_digest(sequences),
        "read": sequences_digest(read), "langs": list(langs), "groups": list(groups), "layers": chosen,
    }  # fmt: skip
    return Activity(settings, tuple(langs), tuple(groups), sparse, counter.tokens, counter.active, counter.response)


class _Counter:
    """A hook on gate activations that adds up, sequence by sequence, what an Activity holds."""

    def __init__(self, model: Llama, layers: Sequence[int], n_sequences: int) -> None:
        self.names = []
        self.tokens: dict[int, Counts] = {}
        self.active: dict[int, Counts] = {}
        self.response: dict[int, Counts] = {}
        self._ids = torch.empty(0)
        for layer in layers:
            sparse = isinstance(model.blocks[layer].mlp, Moe)
            leaves = ("hook_expert_ids", "hook_expert_pre") if sparse else ("hook_pre",)
            self.names += [f"blocks.{layer}.mlp.{leaf}" for leaf in leaves]
            shape = (model.cfg.n_experts, model.cfg.d_expert) if sparse else (1, model.cfg.d_mlp)  # type: ignore[union-attr]
            self.tokens[layer] = np.zeros((n_sequences, shape[0]))
            self.active[layer] = np.zeros((n_sequences, *shape), dtype=np.float32)
            self.response[layer] = np.zeros((n_sequences, *shape), dtype=np.float32)

    def begin(self, start: int, kept: Tensor) -> None:
        self._start, self._kept = start, kept

    def __call__(self, x: Tensor, hook: HookPoint) -> None:
        if hook.name.endswith("hook_expert_ids"):
            self._ids = x
            return
        layer, kept = hook.layer(), self._kept.to(x.device)
        gates = x[kept].float()  # [token d_mlp] or [token k d_expert]
        rows = kept.nonzero()[:, 0] + self._start  # [token]
        if gates.ndim == 2:
            gates, experts = gates[:, None], torch.zeros(len(gates), 1, dtype=torch.long, device=x.device)
        else:
            experts = self._ids[kept]  # [token k]
        n_experts = self.tokens[layer].shape[1]
        cells = (rows[:, None] - self._start) * n_experts + experts  # [token k]
        n_cells = len(self._kept) * n_experts
        part = slice(self._start, self._start + len(self._kept))
        self.tokens[layer][part] += torch.bincount(cells.flatten(), minlength=n_cells).view(-1, n_experts).cpu().numpy()
        for target, values in ((self.active, (gates > 0).float()), (self.response, F.silu(gates))):
            sums = gates.new_zeros(n_cells, gates.shape[-1]).index_add_(0, cells.flatten(), values.flatten(0, 1))
            target[layer][part] += sums.view(-1, n_experts, gates.shape[-1]).cpu().numpy()
