"""Recordings of a model's own runs, to patch from and to freeze routing to."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.activations import ActivationCache
from workbench.interventions import FreezeRouting, Where
from workbench.models import Llama


@torch.no_grad()
def own_cache(model: Llama, tokens: Tensor) -> ActivationCache:
    return model.run_with_cache(tokens)[1]


def frozen(model: Llama, tokens: Tensor, *, weights: bool = True, where: Where | None = None) -> FreezeRouting:
    return FreezeRouting.from_cache(own_cache(model, tokens), weights=weights, where=where)
