"""What may be asked of a mixture-of-experts layer, what may be changed in it, and what it reports.

Legend: T tokens, D d_model, F d_expert, E experts, K slots per token. A *slot* is one (token, rank) pair; everything
that is routed comes in slot order [T, K, ...].

One layer, step by step; what is asked for is taken at the step that is marked with its name:
   1  logits = x · router_weightᵀ in float32                                   -> router_logits: always the clean ones
   2  logits += router_bias; experts outside keep_mask get -inf
   3  probs = softmax(logits) over all experts, float32                        -> router_probs, margin
   4  ids = the K most probable, by descending probability, the lowest id among equals; forced_ids take their place
   5  weights = probs[ids], divided by their sum if norm_topk_prob; forced_weights take their place
                                                              -> expert_ids, routing_weights, expert_load
   6  gate, up = the two halves of gate_up[id] · x                             -> expert_pre, expert_pre_linear
   7  hidden = silu(gate) · up                                                 -> expert_post
   8  out = down[id] · hidden; out *= expert_scale[id] (a scale of 0 gives 0, even of NaN); out += expert_add[id];
      where replace_experts[id], replace_rows[token, slot] takes its place     -> expert_out: what is mixed, unweighted
   9  y = sum over slots, in slot order and float32, of weight · out

keep_mask decides what the router may choose; forced ids are not its choice, but an expert outside the mask has
probability 0. Weights that sum to 0 stay 0. `router_logits` never show an intervention; `router_probs` and all that
follows do.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

ROUTED = ("expert_pre", "expert_pre_linear", "expert_post", "expert_out")  # [T, K, ...]
NEEDS = (*ROUTED, "router_probs", "margin")
PATHS = ("decode", "skinny", "tile")
NUMERICS = ("trained", "hf")


@dataclass(frozen=True)
class Need:
    """What to return beside the routing itself, by name.

    names: among expert_pre (gate projection [T, K, F], before silu), expert_pre_linear (up projection [T, K, F]),
    expert_post (their product after silu [T, K, F]), expert_out ([T, K, D], before weighting), router_probs ([T, E]),
    margin ([T], the K-th minus the (K+1)-th logit among those ranked; NaN when every expert is always chosen).
    experts, tokens: restrict the routed ones to chosen experts and tokens, as ids or as a bool mask ([E], [T]); every
    other slot is then 0. A mask on the device may change its values between calls without a new compilation or capture;
    ids are turned into one in every call, which a graph cannot capture.
    """

    names: Sequence[str] = ()
    experts: Tensor | Sequence[int] | None = None
    tokens: Tensor | Sequence[int] | None = None

    @classmethod
    def of(cls, need: Need | Sequence[str] | None) -> Need:
        """A tuple of names is short for a Need. Raises ValueError for unknown names and for what holds no names."""
        given = need.names if isinstance(need, Need) else () if need is None else need
        if isinstance(given, str):
            raise ValueError(f"need: expected a tuple of names, got {given!r}. Write need=({given!r},).")
        if not isinstance(given, Sequence | Set):
            raise ValueError(
                f"need: expected a tuple of names or a Need, got {type(given).__name__}. Write need=('margin',)."
            )
        unknown = [name for name in given if name not in NEEDS]
        if unknown:
            raise ValueError(
                f"need: expected names among {', '.join(NEEDS)}, got {', '.join(map(repr, unknown))}. Ask for those."
            )
        return replace(need, names=tuple(given)) if isinstance(need, Need) else cls(tuple(given))

    def of_layer(self, n_experts: int, n_tokens: int, device: torch.device) -> Need:
        """With masks in place of ids. Raises ValueError for experts and tokens that this layer has not."""
        masks = self.expert_mask(n_experts, device), self.token_mask(n_tokens, device)
        return Need(self.names, *masks)

    @property
    def restricted(self) -> bool:
        return self.experts is not None or self.tokens is not None

    def expert_mask(self, n_experts: int, device: torch.device) -> Tensor | None:  # [E] bool
        return _mask("need.experts", self.experts, n_experts, device)

    def token_mask(self, n_tokens: int, device: torch.device) -> Tensor | None:  # [T] bool
        return _mask("need.tokens", self.tokens, n_tokens, device)


@dataclass(frozen=True)
class Intervene:
    """What to change inside the layer; the order in which changes act is in this module's docstring.

    Every field is a tensor that a kernel reads when it runs: keep it in one buffer and write into that, and changing a
    value neither compiles nor captures anything again. Which fields are set decides which kernel variant runs.
    """

    router_bias: Tensor | None = None  # [E] or [T, E], floating: added to the logits
    keep_mask: Tensor | None = None  # [E] or [T, E], bool: False takes an expert away from the router, which re-routes
    expert_scale: Tensor | None = None  # [E], floating: multiplies an expert's output; 0 ablates without re-routing
    expert_add: Tensor | None = None  # [E, D], floating: added to an expert's output, before weighting
    forced_ids: Tensor | None = None  # [T, K], integer: the experts to use, distinct within a token
    forced_weights: Tensor | None = None  # [T, K], floating: the weights to use, as they are
    replace_experts: Tensor | None = None  # [E], bool: experts whose output is taken from replace_rows
    replace_rows: Tensor | None = None  # [T, K, D], floating: unweighted outputs in slot order

    @property
    def active(self) -> tuple[str, ...]:
        """The fields that are set."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)


@dataclass(frozen=True)
class Routing:
    """What happened: where each token went, what was asked for, and which code ran.

    router_logits float32 [T, E]; expert_ids int64 [T, K] by descending weight unless forced; routing_weights float32
    [T, K], the ones used; expert_load float32 [E], the share of the T·K slots that each expert got (zeros when T = 0).
    Whatever was not asked for is None. `path` is None outside the Triton kernels.
    """

    router_logits: Tensor
    expert_ids: Tensor
    routing_weights: Tensor
    expert_load: Tensor
    impl: str
    path: str | None = None
    router_probs: Tensor | None = None
    margin: Tensor | None = None
    expert_pre: Tensor | None = None
    expert_pre_linear: Tensor | None = None
    expert_post: Tensor | None = None
    expert_out: Tensor | None = None


def hf_router_dtype(x: Tensor, router_weight: Tensor) -> torch.dtype:
    """Of logits and weights in hf numerics: that of the router's weight, in which transformers multiplies.

    float64 is left to float64 layers.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return wide if router_weight.dtype == torch.float64 else router_weight.dtype


def _mask(name: str, chosen: Tensor | Sequence[int] | None, size: int, device: torch.device) -> Tensor | None:
    if chosen is None:
        return None
    ids = _as_tensor(name, chosen)
    if ids.dtype == torch.bool:
        if ids.shape != (size,):
            raise ValueError(
                f"{name}: expected ids or a mask [{size}], got a mask {list(ids.shape)}. Give each a bool."
            )
        return ids.to(device)
    if ids.ndim != 1 or ids.dtype.is_floating_point or ids.dtype.is_complex:
        raise ValueError(f"{name}: expected ids in one dimension, got {ids.dtype} {list(ids.shape)}. Give integers.")
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(
            f"{name}: expected ids from 0 to {size - 1}, got {int(ids.min())} to {int(ids.max())}. Leave others out."
        )
    return torch.zeros(size, dtype=torch.bool, device=device).index_fill_(0, ids.to(device, torch.int64), True)


def _as_tensor(name: str, chosen: Tensor | Sequence[int]) -> Tensor:
    if isinstance(chosen, Tensor):
        return chosen
    try:
        ids = torch.tensor(list(chosen))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected ids or a mask, got {chosen!r}. Give a list of integers.") from None
    return ids if len(ids) else ids.long()  # an empty list is float32 to torch
