"""A model's weights in the shapes that TransformerLens names: W_Q, W_K, W_V, W_O, W_in, W_gate, W_out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from workbench.errors import HookError


class View(nn.Module):
    """A module under another class: what this class lacks is looked up in the module."""

    module: Any

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class BlockView(View):
    hook_out_is_single_residual_stream = True  # what logit_lens checks for

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.attn, self.mlp = AttentionView(block.attn), MlpView(block.mlp)


class AttentionView(View):
    """Attention weights with a head axis; keys and values have one entry per key-value head."""

    @property
    def W_Q(self) -> Tensor:  # [head d_model d_head]
        return self._split(self.q_proj.weight)

    @property
    def W_K(self) -> Tensor:  # [kv_head d_model d_head]
        return self._split(self.k_proj.weight)

    @property
    def W_V(self) -> Tensor:  # [kv_head d_model d_head]
        return self._split(self.v_proj.weight)

    @property
    def W_O(self) -> Tensor:  # [head d_head d_model]
        return self.o_proj.weight.T.unflatten(0, (-1, self.module.cfg.d_head))

    def _split(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (-1, self.module.cfg.d_head)).transpose(1, 2)


class MlpView(View):
    """The weights of a dense MLP. Raises HookError for a mixture of experts, which has no such matrix."""

    @property
    def W_in(self) -> Tensor:  # [d_model d_mlp]
        return self._weight("up_proj")

    @property
    def W_gate(self) -> Tensor:  # [d_model d_mlp]
        return self._weight("gate_proj")

    @property
    def W_out(self) -> Tensor:  # [d_mlp d_model]
        return self._weight("down_proj")

    def _weight(self, name: str) -> Tensor:
        if name not in self.module._modules:
            raise no_neurons(name)
        return getattr(self.module, name).weight.T


def no_neurons(name: str) -> HookError:
    return HookError(
        f"{name}: expected a dense MLP, got a mixture of experts, whose neurons differ from token to token. "
        "Use workbench.experiments.lens for neurons inside experts."
    )
