"""The two architectures, and how to build one from a configuration."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from workbench.config import ModelConfig, Qwen3MoeConfig
from workbench.errors import ConfigError
from workbench.models.cache import KVCache
from workbench.models.generate import Generation, generate
from workbench.models.llama import Llama
from workbench.models.moe import ROUTER_DTYPES, Moe
from workbench.models.moe_weights import EXPERT_FORMATS, hold_quantised
from workbench.models.qwen3_moe import Qwen3Moe
from workbench_kernels import choose_implementation
from workbench_kernels.moe.choice import triton_obstacle

__all__ = [
    "Generation",
    "KVCache",
    "Llama",
    "Qwen3Moe",
    "build_model",
    "generate",
    "init_weights",
    "quantised_implementation",
]


def build_model(
    cfg: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    moe_impl: str = "auto",
    router_dtype: str = "float32",
    attn_impl: str = "sdpa",
    experts: str = "plain",
) -> Llama:
    """A model of either architecture with unset weights, in evaluation mode; `device="meta"` allocates nothing.

    `moe_impl` is resolved here and stays what it is: "auto" becomes "sorted" on CPU and "grouped_mm" for bfloat16 on
    CUDA if it takes the experts' widths. `experts` "int8" or "int4" holds the experts quantised, in any case of
    "auto" with triton where that runs.
    Raises ConfigError for a name that does not exist and for an implementation that cannot run these experts.
    """
    target = torch.device(device)
    if experts not in EXPERT_FORMATS:
        raise ConfigError(f"experts: expected one of {', '.join(EXPERT_FORMATS)}, got {experts!r}.")
    bits = EXPERT_FORMATS[experts] if cfg.is_moe else 16
    with torch.device("meta"):  # first without memory: constructors would fill float32 weights only to be overwritten
        if bits == 16:
            chosen = plain_implementation(cfg, moe_impl, target, dtype)  # checked for a dense model too
        else:
            chosen = quantised_implementation(moe_impl, target, dtype)
        if router_dtype not in ROUTER_DTYPES:
            raise ConfigError(f"router_dtype: expected one of {', '.join(ROUTER_DTYPES)}, got {router_dtype!r}.")
        if isinstance(cfg, Qwen3MoeConfig):
            model: Llama = Qwen3Moe(cfg, attn_impl, chosen, router_dtype)
        else:
            model = Llama(cfg, attn_impl)
    model = model.to(dtype).eval()
    if bits != 16:
        _hold_quantised(model, bits)
    if target.type == "meta":
        return model
    model = model.to_empty(device=target)
    if cfg.tie_embeddings:  # to_empty gives each reference a tensor of its own
        model.unembed.weight = model.embed.weight
    return model


def plain_implementation(cfg: ModelConfig, moe_impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that runs a model's experts as they are; "auto" is never one that their widths rule out.

    Raises ConfigError for one that cannot run.
    """
    weights: list[torch.Tensor] = []
    if isinstance(cfg, Qwen3MoeConfig):
        weights = [torch.empty(0, 0, width, dtype=dtype, device="meta") for width in (cfg.d_model, cfg.d_expert)]
    return _implementation(moe_impl, device, dtype, weights)


def _implementation(
    moe_impl: str, device: torch.device, dtype: torch.dtype, weights: Sequence[torch.Tensor] = ()
) -> str:
    try:
        return choose_implementation(moe_impl, device, dtype, weights=weights)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def quantised_implementation(moe_impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that runs int8 or int4 experts. Raises ConfigError for one that cannot."""
    if moe_impl == "auto":
        moe_impl = "triton" if device.type == "cuda" and not triton_obstacle(device, dtype) else "sorted"
    if moe_impl == "grouped_mm":
        raise ConfigError("moe_impl: expected triton, sorted or reference for quantised experts, got 'grouped_mm'.")
    if moe_impl != "triton":
        warnings.warn(
            f"int8 or int4 experts with moe_impl {moe_impl!r}: every expert that is hit is dequantised in every call. "
            "They save memory and no time; moe_impl='triton' reads them as they are.",
            stacklevel=3,
        )
    return _implementation(moe_impl, device, dtype)


def _hold_quantised(model: Llama, bits: int) -> None:
    for module in list(model.modules()):
        if isinstance(module, Moe):
            try:
                hold_quantised(module, bits)
            except ValueError as error:
                raise ConfigError(str(error)) from None


@torch.no_grad()
def init_weights(model: Llama, seed: int, std: float = 0.02) -> Llama:
    """Set every matrix to normal(0, std) and every norm weight to 1, reproducibly; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model
