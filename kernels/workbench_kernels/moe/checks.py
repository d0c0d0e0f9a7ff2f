"""The arguments of one layer, checked before anything runs. Values are looked at on CPU only: no wait for a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench_kernels.moe.plan import NUMERICS, PATHS, Intervene
from workbench_kernels.quant import QuantizedExperts

Weight = Tensor | QuantizedExperts
_ARTICLE = {"bool": "a", "floating": "a", "integer": "an"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_layer(
    x: Tensor, router_weight: Tensor, gate_up: Weight, down: Weight, k: int, path: str, numerics: str
) -> None:
    """Types, shapes, dtypes and devices of the layer itself. Raises ValueError naming what does not fit."""
    if not isinstance(x, Tensor) or x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x: expected a floating tensor [T, d_model], got {_described(x)}. Flatten or convert it.")
    d_model = x.shape[1]
    if not isinstance(router_weight, Tensor) or router_weight.dtype not in DTYPES:
        raise ValueError(
            f"router_weight: expected a floating tensor [E, {d_model}], got {_described(router_weight)}. Convert it."
        )
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if not isinstance(weight, Weight):
            raise ValueError(
                f"{name}: expected a tensor or QuantizedExperts, got {_described(weight)}. Stack the experts into one."
            )
    _shape("router_weight", router_weight.shape, ("E", d_model))
    n_experts = router_weight.shape[0]
    _shape("gate_up", gate_up.shape, (n_experts, "2·d_expert", d_model))
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected an even number of rows (gate, then up), got {gate_up.shape[1]}.")
    _shape("down", down.shape, (n_experts, d_model, gate_up.shape[1] // 2))
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if isinstance(weight, Tensor) and weight.dtype != x.dtype:
            raise ValueError(f"{name}: expected {x.dtype} like x, got {weight.dtype}. Convert one of the two.")
    for name, tensor in (("router_weight", router_weight), ("gate_up", gate_up), ("down", down)):
        _same_device(name, tensor.device, x.device)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n_experts:
        raise ValueError(
            f"k: expected 1 to {n_experts} (the number of experts), as an int, got {k!r}. "
            "Give how many experts a token takes."
        )
    check_path(path)
    if not isinstance(numerics, str) or numerics not in NUMERICS:
        raise ValueError(f"numerics: expected one of {', '.join(NUMERICS)}, got {numerics!r}. Name one of them.")


def check_path(path: str) -> None:
    """Raises ValueError unless this is "auto" or one of the Triton paths."""
    if not isinstance(path, str) or path not in ("auto", *PATHS):
        raise ValueError(f"path: expected one of auto, {', '.join(PATHS)}, got {path!r}. Name one of them.")


def check_intervene(intervene: Intervene, n_tokens: int, n_experts: int, k: int, d_model: int, like: Tensor) -> None:
    """Types, shapes, dtypes, devices, and on CPU the values, of every field that is set. Raises ValueError."""
    if not isinstance(intervene, Intervene):
        raise ValueError(
            f"intervene: expected an Intervene or None, got {_described(intervene)}. Write intervene=Intervene(...)."
        )
    per_expert, per_token = (n_experts,), (n_tokens, n_experts)
    expected: dict[str, tuple[str, Sequence[tuple[int, ...]]]] = {
        "router_bias": ("floating", (per_expert, per_token)),
        "keep_mask": ("bool", (per_expert, per_token)),
        "expert_scale": ("floating", (per_expert,)),
        "expert_add": ("floating", ((n_experts, d_model),)),
        "forced_ids": ("integer", ((n_tokens, k),)),
        "forced_weights": ("floating", ((n_tokens, k),)),
        "replace_experts": ("bool", (per_expert,)),
        "replace_rows": ("floating", ((n_tokens, k, d_model),)),
    }
    for name in intervene.active:
        tensor = getattr(intervene, name)
        kind, shapes = expected[name]
        if not isinstance(tensor, Tensor) or _kind(tensor.dtype) != kind or tuple(tensor.shape) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(
                f"{name}: expected {_ARTICLE[kind]} {kind} tensor {wanted}, got {_described(tensor)}. See Intervene."
            )
        _same_device(name, tensor.device, like.device)
    if (intervene.replace_experts is None) != (intervene.replace_rows is None):
        raise ValueError("replace_experts, replace_rows: expected both or neither, got one. They act together.")
    if like.device.type == "cpu":
        _check_values(intervene, n_experts, k)


def _check_values(intervene: Intervene, n_experts: int, k: int) -> None:
    keep, ids = intervene.keep_mask, intervene.forced_ids
    if keep is not None and keep.numel() and (fewest := int(keep.sum(-1).min())) < k:
        raise ValueError(f"keep_mask: expected at least k = {k} experts to remain, got {fewest}. Keep more of them.")
    if ids is None or not ids.numel():
        return
    if not 0 <= int(ids.min()) <= int(ids.max()) < n_experts:
        raise ValueError(
            f"forced_ids: expected ids from 0 to {n_experts - 1}, got {int(ids.min())} to {int(ids.max())}."
        )
    if (ids.sort(-1).values.diff(dim=-1) == 0).any():
        raise ValueError(
            "forced_ids: expected distinct experts within a token, got duplicates. Give each slot its own."
        )


def _shape(name: str, shape: Sequence[int], expected: tuple[int | str, ...]) -> None:
    fits = len(shape) == len(expected) and all(
        isinstance(e, str) or e == s for s, e in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"{name}: expected [{wanted}], got {list(shape)}. See fused_moe for the layout.")


def _same_device(name: str, device: torch.device, expected: torch.device) -> None:
    if device != expected:
        raise ValueError(f"{name}: expected device {expected} like x, got {device}. Move it there.")


def _kind(dtype: torch.dtype) -> str:
    """What the layer can compute with; of complex, float8 and unsigned words it has none."""
    if dtype == torch.bool:
        return "bool"
    return "floating" if dtype in DTYPES else "integer" if dtype in _INTEGERS else "other"


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
