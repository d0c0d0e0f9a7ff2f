"""Interventions as tensors of the caller, which the experts' kernels read in every pass: written into, they change.

A value such as KnockOut is settled when it is attached; a buffer may be written between two passes, or two steps of a
captured graph, and the next one acts on what it holds then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from workbench.errors import InterventionError
from workbench.interventions.session import Attachable
from workbench.interventions.where import Batch
from workbench_kernels.moe.checks import check_intervene
from workbench_kernels.moe.plan import Intervene

FIELDS = ("router_bias", "keep_mask", "expert_scale", "expert_add", "forced_ids", "forced_weights")


@dataclass(frozen=True, eq=False)
class KernelBuffers(Attachable):
    """For each layer named an `Intervene` whose tensors act at all tokens, on the model's device.

    layers: number -> Intervene with any of router_bias [expert], keep_mask bool [expert], expert_scale [expert],
    expert_add [expert d_model], forced_ids and forced_weights [1 k]. Hooks, and what is recorded at them, see router
    logits without bias and mask, and everything after those as it acts. Values are looked at when it is attached alone.
    Raises InterventionError for other fields, shapes or dtypes, and beside other interventions on one layer's experts.
    """

    layers: Mapping[int, Intervene]

    def batches(self) -> list[Batch]:
        return []

    def check(self, model: Any) -> None:
        for number, given in self.layers.items():
            mlp = _experts(model, number)
            unknown = [name for name in getattr(given, "active", ()) if name not in FIELDS]
            routing = (getattr(given, name, None) for name in ("router_bias", "keep_mask"))
            per_token = ["one for each token" for value in routing if getattr(value, "ndim", 1) != 1]
            if unknown or per_token:
                raise InterventionError(
                    f"layer {number}: expected fields for all tokens among {', '.join(FIELDS)}, "
                    f"got {', '.join(unknown + per_token)}. Leave those out."
                )
            try:
                check_intervene(given, 1, model.cfg.n_experts, model.cfg.k, model.cfg.d_model, mlp.router.weight)
            except ValueError as error:
                raise InterventionError(f"layer {number}: {error}") from None
            if mlp.kernel_buffers is not None:
                raise InterventionError(f"layer {number}: expected no buffers yet, got some. Leave one of them out.")

    @contextmanager
    def attach(self, model: Any) -> Iterator[None]:
        self.check(model)
        for number, given in self.layers.items():
            _experts(model, number).kernel_buffers = given
        try:
            yield
        finally:
            for number in self.layers:
                _experts(model, number).kernel_buffers = None


def at_tokens(given: Intervene, batch_pos: Sequence[int]) -> Intervene:
    """The same with forced experts and weights [1 k] at every token of a pass [token k], read anew in each pass."""
    n_tokens = batch_pos[0] * batch_pos[1]
    forced: dict[str, Any] = {}
    if given.forced_ids is not None:
        forced["forced_ids"] = given.forced_ids.long().expand(n_tokens, -1).contiguous()
    if given.forced_weights is not None:
        forced["forced_weights"] = given.forced_weights.expand(n_tokens, -1).contiguous()
    return replace(given, **forced) if forced else given


def _experts(model: Any, number: int) -> Any:
    layers = [layer for layer, sparse in enumerate(getattr(model.cfg, "sparse_layers", ())) if sparse]
    if number not in layers:
        raise InterventionError(f"layers: expected some with experts ({layers}), got {number!r}. Name others.")
    return model.blocks[number].mlp
