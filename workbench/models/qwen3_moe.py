"""The sparse model: the dense one with qk-norm in attention and experts in place of the MLP."""

from __future__ import annotations

from torch import nn

from workbench.config import Qwen3MoeConfig
from workbench.models.attention import Attention
from workbench.models.layers import SwiGLU
from workbench.models.llama import Block, Llama
from workbench.models.moe import Moe


class Qwen3Moe(Llama):
    """A Qwen3-MoE decoder with hook points; layers that `cfg.sparse_layers` leaves out have a dense MLP."""

    cfg: Qwen3MoeConfig

    def __init__(
        self, cfg: Qwen3MoeConfig, attn_impl: str = "sdpa", moe_impl: str = "sorted", router_dtype: str = "float32"
    ) -> None:
        self._moe_impl, self.router_dtype = moe_impl, router_dtype
        super().__init__(cfg, attn_impl)

    def make_block(self, layer: int) -> Block:
        sparse = self.cfg.sparse_layers[layer]
        mlp: nn.Module = Moe(self.cfg, self._moe_impl, self.router_dtype) if sparse else SwiGLU(self.cfg)
        return Block(Attention(self.cfg, layer, qk_norm=True, attn_impl=self.attn_impl), mlp, self.cfg)

    @property
    def moe_impl(self) -> str:
        """Which implementation computes the experts."""
        return self._moe_impl
