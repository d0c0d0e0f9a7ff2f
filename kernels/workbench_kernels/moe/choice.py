"""Which implementation runs: chosen once, by name or by device, and never swapped silently."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch

from workbench_kernels.quant import QuantizedExperts

Weight = torch.Tensor | QuantizedExperts
FALLBACKS = ("sorted", "grouped_mm", "reference")  # these have gradients
CHOICES = (*FALLBACKS, "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_implementation(
    impl: str, device: torch.device, dtype: torch.dtype, gradients: bool = True, weights: Sequence[Weight] = ()
) -> str:
    """The implementation that runs for `impl` ("auto" or a name). Raises ValueError for one that cannot run.

    "auto" is grouped_mm for bfloat16 on CUDA, if it can multiply `weights` (gate_up and down, where they are known),
    and sorted elsewhere; where no gradients are wanted (`fused_moe`), it is triton on CUDA devices from sm_80 on.
    """
    if isinstance(impl, str) and impl == "auto":
        if not gradients and device.type == "cuda" and not triton_obstacle(device, dtype):
            return "triton"
        grouped = device.type == "cuda" and dtype == torch.bfloat16 and all(map(_grouped_mm_takes, weights))
        return "grouped_mm" if grouped else "sorted"
    if not isinstance(impl, str) or impl not in CHOICES:
        raise ValueError(f"moe_impl: expected one of auto, {', '.join(CHOICES)}, got {impl!r}. Name one of them.")
    if impl == "grouped_mm" and dtype == torch.float64:
        raise ValueError("moe_impl: expected sorted or reference for a float64 model, got 'grouped_mm'. Choose one.")
    if impl == "triton" and (obstacle := triton_obstacle(device, dtype)):
        raise ValueError(f"moe_impl: expected one that runs here (sorted, reference), got 'triton'. {obstacle}")
    return impl


def _grouped_mm_takes(weight: Weight) -> bool:
    return isinstance(weight, torch.Tensor) and weight.shape[-1] * weight.element_size() % 16 == 0


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the Triton kernels cannot run for tensors like these; empty when they can."""
    if not _installed():
        return "triton is not installed: install the extra `kernels`."
    if dtype not in TRITON_DTYPES:
        return f"The kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}."
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "The kernels need compute capability 8.0 or newer."
        return "" if not interpreting() else "TRITON_INTERPRET=1 is set: unset it to run on the GPU."
    if device.type == "cpu":
        return "" if interpreting() else "On CPU they run in triton's interpreter alone: TRITON_INTERPRET=1."
    if device.type == "meta":
        return ""  # a model that is built without memory moves elsewhere before it runs
    return f"The kernels do not run on {device.type}."


def interpreting() -> bool:
    """Whether kernels decorated from now on run in triton's interpreter; asked here because that needs numpy."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
