"""The sparse model: the dense one with qk-norm in attention and experts in place of the MLP."""

from __future__ import annotations

from torch import nn

from workbench.config import Qwen3MoeConfig
from workbench.errors import ConfigError
from workbench.models.attention import Attention
from workbench.models.layers import SwiGLU
from workbench.models.llama import Block, Llama
from workbench.models.moe import Moe
from workbench_kernels.moe.checks import check_path


class Qwen3Moe(Llama):
    """A Qwen3-MoE decoder with hook points; layers that `cfg.sparse_layers` leaves out have a dense MLP."""

    cfg: Qwen3MoeConfig

    def __init__(
        self, cfg: Qwen3MoeConfig, attn_impl: str = "sdpa", moe_impl: str = "sorted", router_dtype: str = "float32"
    ) -> None:
        self._moe_impl, self._moe_path, self.router_dtype = moe_impl, "auto", router_dtype
        super().__init__(cfg, attn_impl)

    def make_block(self, layer: int) -> Block:
        sparse = self.cfg.sparse_layers[layer]
        mlp: nn.Module = Moe(self.cfg, self._moe_impl, self.router_dtype) if sparse else SwiGLU(self.cfg)
        return Block(Attention(self.cfg, layer, qk_norm=True, attn_impl=self.attn_impl), mlp, self.cfg)

    @property
    def moe_impl(self) -> str:
        """Which implementation computes the experts."""
        return self._moe_impl

    @property
    def moe_path(self) -> str:
        """Which of the Triton paths computes the experts: "auto" (by the number of tokens in a pass), or a pinned one.

        `model.moe_path = "tile"` pins it from the next pass on, so that a clean and a patched run use the same
        arithmetic whatever their length: "decode" (meant for up to 4 tokens), "skinny" or "tile". Raises ConfigError
        for another name, and for a path where the experts are not computed by triton.
        """
        return self._moe_path

    @moe_path.setter
    def moe_path(self, path: str) -> None:
        try:
            check_path(path)
        except ValueError as error:
            raise ConfigError(f"moe_{error}") from None
        if path != "auto" and self.moe_impl != "triton":
            raise ConfigError(
                f"moe_path: expected auto with moe_impl {self.moe_impl!r}, got {path!r}. Paths are those of triton."
            )
        self._moe_path = path
        for block in self.blocks:
            if isinstance(block.mlp, Moe):
                block.mlp.path = path
