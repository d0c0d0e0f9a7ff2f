"""Routed experts of a mixture-of-experts layer, usable without the workbench."""

from workbench_kernels.experts import matrices_kept, routed_experts
from workbench_kernels.moe.api import fused_moe
from workbench_kernels.moe.choice import FALLBACKS as IMPLEMENTATIONS
from workbench_kernels.moe.choice import choose_implementation
from workbench_kernels.moe.plan import Intervene, Need, Routing
from workbench_kernels.quant import QuantizedExperts, quantize

__all__ = [
    "IMPLEMENTATIONS",
    "Intervene",
    "Need",
    "QuantizedExperts",
    "Routing",
    "choose_implementation",
    "fused_moe",
    "matrices_kept",
    "quantize",
    "routed_experts",
]
