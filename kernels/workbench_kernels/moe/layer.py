"""The values that pass between the stages of the Triton path; no triton in here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench_kernels.moe.checks import Weight
from workbench_kernels.moe.plan import Intervene, Need, hf_router_dtype
from workbench_kernels.tables import Blocks


@dataclass(frozen=True)
class Layer:
    """One call: the tensors, what is asked and changed, and how it runs."""

    x: Tensor  # [T, D], last axis contiguous
    router_weight: Tensor  # [E, D]
    gate_up: Weight  # [E, 2F, D]
    down: Weight  # [E, D, F]
    k: int
    norm_topk_prob: bool
    need: Need
    change: Intervene
    path: str  # decode, skinny or tile
    hf: bool  # round where transformers' grouped_mm rounds
    blocks: Blocks

    @property
    def n_tokens(self) -> int:
        return self.x.shape[0]

    @property
    def n_experts(self) -> int:
        return self.router_weight.shape[0]

    @property
    def d_model(self) -> int:
        return self.x.shape[1]

    @property
    def d_expert(self) -> int:
        return self.down.shape[2]

    @property
    def rounds(self) -> bool:
        """Whether hf numerics round anything: to float32 nothing is, so it runs the same kernels."""
        return self.hf and self.x.dtype != torch.float32

    @property
    def router_dtype(self) -> torch.dtype:
        """To which logits and weights are rounded."""
        return hf_router_dtype(self.x, self.router_weight) if self.hf else torch.float32

    @property
    def rounds_products(self) -> bool:
        """Whether weight · output is rounded: transformers has it in the wider dtype of the two."""
        forced = self.change.forced_weights
        weights = self.router_dtype if forced is None else forced.dtype
        return self.rounds and torch.promote_types(self.x.dtype, weights) == self.x.dtype

    @property
    def changes_outputs(self) -> bool:
        return bool({"expert_scale", "expert_add", "replace_experts"} & set(self.change.active))

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.x.dtype, device=self.x.device)


@dataclass(frozen=True)
class Routed:
    """Where the tokens go. `load` is None until a sort has counted."""

    logits: Tensor  # float32 [T, E]
    ids: Tensor  # int64 [T, K]
    weights: Tensor  # float32 [T, K]
    load: Tensor | None = None  # float32 [E]
    probs: Tensor | None = None  # float32 [T, E]
    margin: Tensor | None = None  # float32 [T]


@dataclass(frozen=True)
class Tiles:
    """Sorted slots and the tiles over them."""

    slots: Tensor  # int32 [N]
    expert: Tensor  # int32 [MAX], -1 beyond the real tiles
    first: Tensor  # int32 [MAX]
    end: Tensor  # int32 [MAX]
