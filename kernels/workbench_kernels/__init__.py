"""Routed experts of a mixture-of-experts layer, usable without the workbench."""

from workbench_kernels.experts import IMPLEMENTATIONS, choose_implementation, routed_experts

__all__ = ["IMPLEMENTATIONS", "choose_implementation", "routed_experts"]
