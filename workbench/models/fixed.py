"""Decoding as one step over buffers that never move: what a CUDA graph can capture once and replay for every token.

The step reads its tokens from a buffer, counts positions on the device, writes keys, values and records at places that
lie on the device, and leaves logits in a buffer. From step to step nothing else changes, neither shapes nor what runs.
The first step of a generation runs as it is, which compiles kernels and makes the buffers; the second is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import ConfigError, HookError, InterventionError
from workbench.interventions.kernel_plan import is_intervention
from workbench.models.cache import FixedCache, KVCache
from workbench.models.passes import Passes
from workbench.models.recording import Recorder

if TYPE_CHECKING:
    from workbench.hooks import HookPoint
    from workbench.models.llama import Llama

DECODES = ("plain", "buffers", "graph")


class FixedPasses(Passes):
    """Passes whose decode steps all are the same step; with `graph`, replayed from a CUDA graph from the second on."""

    def __init__(self, model: Llama, cache: KVCache, recorder: Recorder | None, graph: bool) -> None:
        super().__init__(model, cache, recorder)
        self.graph = graph
        self._fixed: FixedCache | None = None  # once the prompt is in the cache
        self._replay: Callable[[], object] | None = None

    def decode(self, tokens: Tensor, kept: Tensor) -> None:
        first = self._fixed is None
        if self._fixed is None:
            self._fixed = self._fix(len(tokens))
        self._tokens.copy_(tokens)
        self._fixed.kept.copy_(kept[:, None])
        if first or not self.graph:
            self._step()
            self._check_interventions()
        else:
            self._replay = self._replay or capture(self._step)
            self._replay()
        self._fixed.n_seen += 1
        if self.recorder is not None:
            self.recorder.step(1)

    def logits(self) -> Tensor:  # float32 [batch d_vocab] on the CPU
        return super().logits() if self._fixed is None else self._logits.cpu().clone()

    def _fix(self, batch: int) -> FixedCache:
        """The buffers, and the cache and the recorder turned to writing into theirs."""
        device, d_vocab = self.model.device, self.model.cfg.d_vocab
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._logits = torch.zeros(batch, d_vocab, dtype=torch.float32, device=device)
        if self.recorder is not None:
            self.recorder.into_slots(device)
        return FixedCache(self.cache)

    def _step(self) -> None:
        """All that a graph holds; nothing here or below may wait for the device or make a shape from a value."""
        resid = self.model(self._tokens, cache=self._fixed, stop_at_layer=self.model.cfg.n_layers)
        self._logits.copy_(self.model.unembed(self.model.ln_final(resid))[:, -1])
        if self.recorder is not None:
            self.recorder.next_slot()

    def _check_interventions(self) -> None:
        """Raises InterventionError when, in a graph, one acts as Python would at a hook point."""
        edits = [edit for batch in self.model.batches for edit in batch.edits]
        hooks = list(dict.fromkeys(f"{edit.item.kind} ({edit.why})" for edit in edits if edit.why))
        if self.graph and hooks:
            raise InterventionError(
                f"decode='graph': expected interventions that act in the kernels, got {', '.join(hooks)}. "
                "Give them as KernelBuffers, or use decode='plain'."
            )


def capture(step: Callable[[], None]) -> Callable[[], object]:
    """The step as a CUDA graph, which capturing does not run; what is returned runs it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def check_decode(model: Llama, decode: str, cache: str) -> None:
    """Raises ConfigError, HookError or InterventionError unless decoding can go that way; it goes no other way then."""
    if decode not in DECODES:
        raise ConfigError(f"decode: expected one of {', '.join(DECODES)}, got {decode!r}. Name one of them.")
    if decode == "plain":
        return
    if cache != "static":
        raise ConfigError(f"decode={decode!r}: expected cache='static', got {cache!r}. Buffers cannot grow: pass it.")
    if any(batch.label is not None for batch in model.batches):
        raise InterventionError(
            f"decode={decode!r}: expected interventions without label, got some that read tokens to find segments. "
            "Leave label out, or use decode='plain'."
        )
    if decode == "graph":
        _check_graph(model)


def _check_graph(model: Llama) -> None:
    if model.device.type != "cuda":
        raise ConfigError(
            f"decode='graph': expected a model on CUDA, got one on {model.device.type}. "
            "Use decode='buffers' for the same step without a graph, or decode='plain'."
        )
    if model.moe_impl == "sorted":
        raise ConfigError(
            "decode='graph': expected moe_impl triton, grouped_mm or reference, got 'sorted', which counts rows on the "
            "host. Load the model with another."
        )
    if heard := [name for name, point in model.hook_dict.items() if _heard(point)]:
        raise HookError(
            f"decode='graph': expected no hooks, got some at {', '.join(heard[:3])}; a graph calls none. "
            "Use record=, KernelBuffers, or decode='plain'."
        )


def _heard(point: HookPoint) -> bool:
    """Whether anything but an intervention listens, or might."""
    others = point.bwd_hooks or point._forward_hooks or point._forward_pre_hooks or point._backward_hooks
    foreign = others or point._backward_pre_hooks or point.watchers
    return bool(foreign) or not all(map(is_intervention, point.fwd_hooks))
