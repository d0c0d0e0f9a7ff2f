"""Who is measured: ours and every peer, each as a function of x for one layer's weights, or why it is absent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench_kernels import Intervene, Need, QuantizedExperts, fused_moe, quantize

Run = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Shape:
    """One expert layer."""

    d_model: int
    d_expert: int
    n_experts: int
    k: int


REAL = Shape(2560, 960, 128, 8)  # LLM-jp-4 32B-A3B
SMALL = Shape(512, 192, 32, 4)  # the one that is compared on CPU
SMOKE = Shape(64, 64, 8, 2)


@dataclass(frozen=True)
class Layer:
    """Random weights of one layer; outputs keep the size of inputs, as in a trained model."""

    shape: Shape
    router: Tensor  # [E, D]
    gate_up: Tensor  # [E, 2F, D]
    down: Tensor  # [E, D, F]

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Layer:
        g = torch.Generator(device).manual_seed(seed)
        d, f, e = shape.d_model, shape.d_expert, shape.n_experts

        def normal(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device).normal_(0, size[-1] ** -0.5, generator=g)

        return cls(shape, normal(e, d), normal(e, 2 * f, d), normal(e, d, f))

    def skewed(self) -> Layer:
        """The same layer with a router that prefers some experts: for `inputs` of mean 1 logits shift by -log(rank)."""
        preference = -torch.arange(1, self.shape.n_experts + 1, device=self.router.device).float().log()
        router = self.router.float()
        router = router - router.mean(1, keepdim=True) + preference[:, None] / self.shape.d_model
        return Layer(self.shape, router.to(self.router.dtype), self.gate_up, self.down)

    def quantised(self, bits: int) -> tuple[QuantizedExperts, QuantizedExperts]:
        return quantize(self.gate_up, bits), quantize(self.down, bits)


def inputs(
    shape: Shape, n_tokens: int, dtype: torch.dtype, device: torch.device, seed: int, skewed: bool = False
) -> Tensor:
    """[T, D] normal: of mean 0, for which every expert is as likely as any other; of mean 1 for a skewed layer.

    A mean that all tokens share would add the same amount to an expert's logit in every token.
    """
    g = torch.Generator(device).manual_seed(seed)
    noise = torch.empty(n_tokens, shape.d_model, dtype=torch.float32, device=device).normal_(generator=g)
    return (noise + float(skewed)).to(dtype)


def ours(layer: Layer, impl: str, **options: Any) -> Run:
    weights = options.pop("weights", None) or (layer.gate_up, layer.down)
    return lambda x: fused_moe(x, layer.router, *weights, layer.shape.k, impl=impl, **options)[0]


def transformers_layer(layer: Layer, implementation: str) -> Run:
    """transformers' own Qwen3-MoE block on these very tensors. Raises ImportError when transformers is missing."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    shape = layer.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.d_model, num_experts=shape.n_experts, num_experts_per_tok=shape.k,
        moe_intermediate_size=shape.d_expert, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    for owner, name, tensor in (
        (block.gate, "weight", layer.router), (block.experts, "gate_up_proj", layer.gate_up),
        (block.experts, "down_proj", layer.down),
    ):  # fmt: skip
        setattr(owner, name, torch.nn.Parameter(tensor, requires_grad=False))
    return lambda x: block(x.unsqueeze(0))[0]


def liger_layer(layer: Layer) -> Run:
    """Liger-Kernel's fused experts behind a torch router. Raises ImportError without a release that has them."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def run(x: Tensor) -> Tensor:
        probs = torch.nn.functional.linear(x, layer.router).softmax(-1, dtype=torch.float32)
        weights, ids = probs.topk(layer.shape.k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        return LigerFusedMoEFunction.apply(x, layer.gate_up, layer.down, ids, weights)

    return run


PEERS: dict[str, Callable[[Layer], Run]] = {
    "transformers eager": lambda layer: transformers_layer(layer, "eager"),
    "transformers batched_mm": lambda layer: transformers_layer(layer, "batched_mm"),
    "transformers grouped_mm": lambda layer: transformers_layer(layer, "grouped_mm"),
    "torch grouped_mm": lambda layer: ours(layer, "grouped_mm"),
    "liger": liger_layer,
}
GATHERS = {"transformers batched_mm": 64}  # it copies one expert per slot: tokens up to which that is tried
WAITS = {"transformers eager"}  # it reads expert ids on the host: no CUDA graph


def needs(shape: Shape, device: torch.device) -> dict[str, Need]:
    one = torch.zeros(shape.n_experts, dtype=torch.bool, device=device)  # a mask: ids cannot be captured in a graph
    one[shape.n_experts // 2] = True
    return {
        "routing only": Need(),
        "router_probs, margin": Need(("router_probs", "margin")),
        "all of one expert": Need(("expert_pre", "expert_post", "expert_out"), experts=one),
        "expert_pre": Need(("expert_pre",)),
        "expert_pre, expert_pre_linear": Need(("expert_pre", "expert_pre_linear")),
        "expert_post": Need(("expert_post",)),
        "expert_out": Need(("expert_out",)),
    }


def interventions(shape: Shape, n_tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Intervene]:
    e, d, k = shape.n_experts, shape.d_model, shape.k
    keep, one, scale = (torch.ones(e, dtype=kind, device=device) for kind in (torch.bool, torch.bool, torch.float32))
    keep[0], scale[0] = False, 0.0
    one[1:] = False
    ids = torch.arange(n_tokens * k, device=device).reshape(n_tokens, k) % e
    return {
        "router_bias": Intervene(router_bias=torch.zeros(e, device=device)),
        "keep_mask": Intervene(keep_mask=keep),
        "expert_scale": Intervene(expert_scale=scale),
        "expert_add": Intervene(expert_add=torch.zeros(e, d, device=device)),
        "forced_ids": Intervene(forced_ids=ids),
        "forced_weights": Intervene(forced_weights=torch.full((n_tokens, k), 1 / k, device=device)),
        "replace one expert": Intervene(
            replace_experts=one, replace_rows=torch.zeros(n_tokens, k, d, dtype=dtype, device=device)
        ),
    }


def versions() -> dict[str, str]:
    """Versions of what takes part; "absent" where it does not."""
    import importlib.metadata as metadata

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", "transformers", "liger-kernel"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
