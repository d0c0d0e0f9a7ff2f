"""The two architectures, and how to build one from a configuration."""

from __future__ import annotations

import torch

from workbench.config import ModelConfig, Qwen3MoeConfig
from workbench.errors import ConfigError
from workbench.models.cache import KVCache
from workbench.models.generate import Generation, generate
from workbench.models.llama import Llama
from workbench.models.moe import ROUTER_DTYPES
from workbench.models.qwen3_moe import Qwen3Moe
from workbench_kernels import choose_implementation

__all__ = ["Generation", "KVCache", "Llama", "Qwen3Moe", "build_model", "generate", "init_weights"]


def build_model(
    cfg: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    moe_impl: str = "auto",
    router_dtype: str = "float32",
    attn_impl: str = "sdpa",
) -> Llama:
    """A model of either architecture with unset weights, in evaluation mode; `device="meta"` allocates nothing.

    `moe_impl` is resolved here and stays what it is: "auto" becomes "sorted" on CPU and "grouped_mm" for bfloat16 on
    CUDA. Raises ConfigError for a name that does not exist.
    """
    target = torch.device(device)
    with torch.device("meta"):  # first without memory: constructors would fill float32 weights only to be overwritten
        implementation = _implementation(moe_impl, target, dtype)  # checked for a dense model too
        if router_dtype not in ROUTER_DTYPES:
            raise ConfigError(f"router_dtype: expected one of {', '.join(ROUTER_DTYPES)}, got {router_dtype!r}.")
        if isinstance(cfg, Qwen3MoeConfig):
            model: Llama = Qwen3Moe(cfg, attn_impl, implementation, router_dtype)
        else:
            model = Llama(cfg, attn_impl)
    model = model.to(dtype).eval()
    if target.type == "meta":
        return model
    model = model.to_empty(device=target)
    if cfg.tie_embeddings:  # to_empty gives each reference a tensor of its own
        model.unembed.weight = model.embed.weight
    return model


def _implementation(moe_impl: str, device: torch.device, dtype: torch.dtype) -> str:
    try:
        return choose_implementation(moe_impl, device, dtype)
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
