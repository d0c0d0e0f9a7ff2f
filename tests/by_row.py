"""Interventions that tell rows or tokens apart, made for a model and two prompts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from recorded import frozen
from torch import Tensor

from workbench.interventions import BiasRouter, Interventions, KnockOut, PerRow, ScaleExperts, SwapRouting, Where
from workbench.interventions.session import Attachable
from workbench.models import Qwen3Moe

JA = {"experts": (1, 4), "mode": "drop"}
BY_ROW: dict[str, Callable[[Qwen3Moe, Tensor], Attachable]] = {
    "langs": lambda m, t: Interventions([KnockOut(**JA, where=Where(langs=("ja",)))], langs=["ja", "en"]),
    "swap": lambda m, t: Interventions([SwapRouting(rows=(1, 0))]),
    "recordings": lambda m, t: Interventions([frozen(m, t)]),
    "prompts": lambda m, t: Interventions([KnockOut(**JA, where=Where(phase="decode"))], n_prompt=[2, 3]),
    "rows": lambda m, t: PerRow([[BiasRouter(bias=torch.arange(8.0))], [KnockOut(**JA, where=Where(positions=(2,)))]]),
    "segments": lambda m, t: Interventions(
        [KnockOut(**JA, where=Where(segments=("user",)))],
        label=lambda ids: ["user" if i % 2 == ids[0] % 2 else "final" for i in range(len(ids))],
    ),
    "positions": lambda m, t: Interventions([ScaleExperts(experts=(0, 1), factor=3.0, where=Where(positions=(2, -1)))]),
    "prefill": lambda m, t: Interventions([KnockOut(experts=(1, 4), mode="reroute", where=Where(phase="prefill"))]),
}
