"""The Triton path, stage by stage: route the tokens, sort the slots, run the experts, mix.

Between the kernels lie the tensors that somebody may want to see or change: `taps` are functions by name that get such
a tensor and return what takes its place (router_logits [T, E], router_probs [T, E], expert_ids [T, K], routing_weights
[T, K], then expert_pre, expert_pre_linear, expert_post [T, K, F] and expert_out [T, K, D]). Everything between two taps
stays fused, and a tap that returns what it got changes no bit. Grids depend on T alone; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench_kernels.moe.blocks import Blocks
from workbench_kernels.moe.checks import Weight
from workbench_kernels.moe.choice import interpreting
from workbench_kernels.moe.layer import Layer, Routed, Tiles
from workbench_kernels.quant import QuantizedExperts

if interpreting():
    from workbench_kernels import interpreter

    interpreter.correct()

import triton

from workbench_kernels.moe import combine, decode, gemm, router, sort

Taps = Mapping[str, Callable[[Tensor], Tensor]]
_TL = {torch.bfloat16: triton.language.bfloat16, torch.float16: triton.language.float16}
_CHUNK, _MANY = 64, 8192  # slots that one step of the sort looks at; slots from which a program takes several steps


def route(layer: Layer, taps: Taps | None = None) -> Routed:
    """Router logits to experts and weights. A tap costs one more small launch: what follows it is chosen again."""
    taps = taps or {}
    sizes = layer.blocks["router"]
    x = layer.x if layer.router_dtype == torch.float32 else layer.x.to(layer.router_dtype)  # a kernel widens, no more
    bk = sizes["bk"] // 2 if torch.float32 in (x.dtype, layer.router_weight.dtype) else sizes["bk"]
    splits = min(sizes["splits"], triton.cdiv(layer.d_model, bk))
    span = triton.cdiv(triton.cdiv(layer.d_model, splits), bk) * bk
    partial = layer.new(splits, layer.n_tokens, layer.n_experts, dtype=torch.float32)
    router.router_partial_kernel[(triton.cdiv(layer.n_tokens, sizes["bt"]), splits)](
        x, layer.router_weight, partial, layer.n_tokens, layer.d_model, layer.n_experts, x.stride(0),
        BT=sizes["bt"], BE=_power(layer.n_experts), BK=bk, SPAN=span,
        num_warps=sizes["warps"], num_stages=sizes["stages"],
    )  # fmt: skip
    probs = bool({"router_probs", "expert_ids"} & taps.keys()) or "router_probs" in layer.need.names
    routed = _choose(layer, partial, splits, probs=probs)
    if "router_logits" in taps:
        edited = taps["router_logits"](routed.logits).float().contiguous()
        routed = replace(_choose(layer, edited, 1, probs=probs), logits=routed.logits)
    if "router_probs" in taps and routed.probs is not None:
        routed = _again(layer, routed, taps["router_probs"](routed.probs).contiguous())
    if "expert_ids" in taps and routed.probs is not None:
        routed = _again(layer, routed, routed.probs, ids=taps["expert_ids"](routed.ids).contiguous())
    if "routing_weights" in taps:
        routed = replace(routed, weights=taps["routing_weights"](routed.weights).float().contiguous())
    return routed


def _again(layer: Layer, routed: Routed, probs: Tensor, ids: Tensor | None = None) -> Routed:
    new = _choose(layer, probs, 0, ids=ids)
    return replace(routed, ids=new.ids, weights=new.weights, load=new.load, probs=probs)


def _choose(layer: Layer, source: Tensor, splits: int, probs: bool = False, ids: Tensor | None = None) -> Routed:
    """`splits` partial logits [splits, T, E], or with 0 the probabilities; `ids` override forced ones."""
    t, e, change = layer.n_tokens, layer.n_experts, layer.change
    bt = layer.blocks["router"]["tokens"]
    clean = layer.new(t, e, dtype=torch.float32) if splits else None
    asked = layer.new(t, e, dtype=torch.float32) if probs else None
    margin = layer.new(t, dtype=torch.float32) if "margin" in layer.need.names and splits else None
    chosen, weights = layer.new(t, layer.k, dtype=torch.int64), layer.new(t, layer.k, dtype=torch.float32)
    load = layer.new(e, dtype=torch.float32) if t <= bt else None
    bias, keep = _dense(change.router_bias), _dense(change.keep_mask)
    router.choose_kernel[(triton.cdiv(t, bt),)](
        source, bias, keep, _dense(change.forced_ids if ids is None else ids), _dense(change.forced_weights),
        clean, asked, margin, chosen, weights, load, t, e, _row_stride(bias), _row_stride(keep),
        SPLITS=splits, K=layer.k, BK=triton.next_power_of_2(layer.k), BT=bt, BE=_power(e), FULL=layer.k == e,
        FROM_PROBS=splits == 0, NORM=layer.norm_topk_prob,
        ROUND_TO=_TL.get(layer.router_dtype, triton.language.float32), num_warps=4,
    )  # fmt: skip
    return Routed(source if clean is None else clean, chosen, weights, load, asked, margin)


def order(layer: Layer, routed: Routed) -> tuple[Routed, Tiles | None]:
    """Sort the slots by expert and count the load; the decode path sorts nothing, and counts only what is not yet."""
    grouped = layer.path != "decode"
    n, e = routed.ids.numel(), layer.n_experts
    if not n:
        routed = replace(routed, load=torch.zeros(e, dtype=torch.float32, device=layer.x.device))
        return routed, Tiles(*(layer.new(0, dtype=torch.int32) for _ in range(4))) if grouped else None
    if not grouped and routed.load is not None:
        return routed, None
    bm = layer.blocks["bm"] if grouped else 1
    repeat = 16 if n > _MANY else 1
    n_chunks, n_tiles = triton.cdiv(n, _CHUNK * repeat), min(n, triton.cdiv(n, bm) + e - 1)
    counts, starts = (layer.new(n_chunks, e, dtype=torch.int32) for _ in range(2))
    load = layer.new(e, dtype=torch.float32)
    sizes = {"BE": _power(e), "num_warps": 8}
    sort.count_kernel[(n_chunks,)](routed.ids, counts, n, e, C=_CHUNK, REPEAT=repeat, **sizes)
    names = [layer.new(n_tiles, dtype=torch.int32) for _ in range(3)] if grouped else [None] * 3
    # BC is the same at every T: a size that followed it would compile anew where warm_up() has not been
    sort.scan_kernel[(1,)](counts, starts, load, *names, n, n_chunks, e, n_tiles, BM=bm, BC=32, BT=32, **sizes)
    routed = replace(routed, load=load)
    if not grouped:
        return routed, None
    slots = layer.new(n, dtype=torch.int32)
    sort.scatter_kernel[(n_chunks,)](routed.ids, starts, slots, n, e, C=_CHUNK, REPEAT=repeat, **sizes)
    return routed, Tiles(slots, *names)


def experts(
    layer: Layer, routed: Routed, tiles: Tiles | None, taps: Taps | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mixed output [T, D], and what `need` asked for by name."""
    taps = taps or {}
    kept = _Kept(layer)
    shape = (layer.n_tokens, layer.k, layer.d_expert)
    edits = bool({"expert_pre", "expert_pre_linear"} & taps.keys())
    pre = kept.buffer("expert_pre", shape, edits)
    linear = kept.buffer("expert_pre_linear", shape, edits)
    post = kept.copy("expert_post", shape)
    hidden = layer.new(*shape)
    _gate_up(layer, routed, tiles, hidden, pre, linear, post, kept.masks(edits))
    if edits:
        _edit(layer, hidden, pre, linear, taps)
    if "expert_post" in taps:
        hidden = taps["expert_post"](hidden).contiguous()

    shape = (layer.n_tokens, layer.k, layer.d_model)
    # a kernel that mixes rounds outputs, before they are changed, and products, or neither
    apart = layer.changes_outputs and layer.rounds != layer.rounds_products
    fused = tiles is None and "expert_out" not in taps and not apart
    whole = "expert_out" in layer.need.names and not layer.need.restricted
    out = kept.copy("expert_out", shape)
    y = None if fused and not whole else layer.new(*shape)
    mixed = layer.new(layer.n_tokens, layer.d_model)
    _down(layer, routed, tiles, hidden, y, out, mixed if fused else None, kept.masks(False))
    if "expert_out" in taps and y is not None:
        y = taps["expert_out"](y).contiguous()
    if not fused:
        _combine(layer, routed, y, mixed)
    found = {"expert_pre": pre, "expert_pre_linear": linear, "expert_post": post, "expert_out": out}
    if not layer.need.restricted:
        found |= {"expert_post": hidden, "expert_out": y}
    return mixed, {name: found[name] for name in layer.need.names if found.get(name) is not None}  # type: ignore[misc]


class _Kept:
    """The buffers of what is asked for; the kernels write every slot of them, zeros outside a selection."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.need = layer, layer.need
        device = layer.x.device
        self.expert_mask = self.need.expert_mask(layer.n_experts, device)
        self.token_mask = self.need.token_mask(layer.n_tokens, device)

    def buffer(self, name: str, shape: tuple[int, ...], always: bool = False) -> Tensor | None:
        if name not in self.need.names and not always:
            return None
        return self.layer.new(*shape)

    def copy(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """For what exists anyway: a copy is only kept of a selection."""
        return self.buffer(name, shape) if self.need.restricted else None

    def masks(self, everything: bool) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if everything else (_dense(self.expert_mask), _dense(self.token_mask))


def _gate_up(
    layer: Layer, routed: Routed, tiles: Tiles | None, hidden: Tensor, pre: Tensor | None, linear: Tensor | None,
    post: Tensor | None, masks: tuple[Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    sizes, n, d, f = layer.blocks["gate_up"], routed.ids.numel(), layer.d_model, layer.d_expert
    weight, scales, common = _weight(layer, layer.gate_up, sizes)
    stores = (hidden, pre, linear, post, *masks)
    if tiles is None:
        common.pop("TMA")
        decode.decode_gate_up_kernel[(n * triton.cdiv(f, sizes["bn"]),)](
            layer.x, weight, scales, *stores, routed.ids, d, f, layer.x.stride(0), **common
        )
        return
    n_tiles = tiles.expert.numel()
    gemm.gate_up_kernel[(n_tiles * triton.cdiv(f, sizes["bn"]),)](
        layer.x, weight, scales, *stores, tiles.slots, tiles.expert, tiles.first, tiles.end,
        n_tiles, d, f, layer.x.stride(0), **common, **_tiling(layer, sizes),
    )  # fmt: skip


def _down(
    layer: Layer, routed: Routed, tiles: Tiles | None, hidden: Tensor, y: Tensor | None, kept: Tensor | None,
    mixed: Tensor | None, masks: tuple[Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    sizes, d, f, change = layer.blocks["down"], layer.d_model, layer.d_expert, layer.change
    weight, scales, common = _weight(layer, layer.down, sizes)
    changes = [change.expert_scale, change.expert_add, change.replace_experts, change.replace_rows]
    stores = (y, kept, *map(_dense, changes), *masks)
    if tiles is None:
        common.pop("TMA")
        if mixed is not None:  # then whatever else is rounded is so by being stored
            common["ROUND"] = layer.rounds_products
        decode.decode_down_kernel[(layer.n_tokens * triton.cdiv(d, sizes["bn"]),)](
            hidden, weight, scales, *stores, routed.ids, routed.weights, mixed, d, f, **common
        )
        return
    n_tiles = tiles.expert.numel()
    gemm.down_kernel[(n_tiles * triton.cdiv(d, sizes["bn"]),)](
        hidden, weight, scales, *stores, tiles.slots, tiles.expert, tiles.first, tiles.end, n_tiles, d, f,
        **common, **_tiling(layer, sizes),
    )  # fmt: skip


def _combine(layer: Layer, routed: Routed, y: Tensor | None, mixed: Tensor) -> None:
    sizes, d = layer.blocks["combine"], layer.d_model
    bd = min(sizes["bd"], triton.next_power_of_2(d))
    combine.combine_kernel[(layer.n_tokens * triton.cdiv(d, bd),)](
        y, routed.weights, mixed, d, K=layer.k, BD=bd, ROUND=layer.rounds_products, num_warps=sizes["warps"]
    )


def _edit(layer: Layer, hidden: Tensor, pre: Tensor | None, linear: Tensor | None, taps: Taps) -> None:
    """Show copies of gate and up, and compute hidden again where they come back different."""
    edited = [
        taps[name](rows.clone()).contiguous() if name in taps else rows
        for name, rows in (("expert_pre", pre), ("expert_pre_linear", linear))
        if rows is not None
    ]
    combine.edited_swiglu_kernel[(triton.cdiv(hidden.numel(), 1024),)](
        hidden, pre, linear, *edited, hidden.numel(), B=1024, ROUND=layer.rounds, num_warps=4
    )


def _weight(layer: Layer, weight: Weight, sizes: Blocks) -> tuple[Any, Tensor | None, dict[str, Any]]:
    """The kernel's weight operand, its scales, and the options that its format decides."""
    quantized = isinstance(weight, QuantizedExperts)
    values, scales = (weight.values, weight.scales) if isinstance(weight, QuantizedExperts) else (weight, None)
    fmt = weight.bits if isinstance(weight, QuantizedExperts) else 0
    bk = weight.group if quantized and fmt == 4 else sizes["bk"]  # type: ignore[union-attr]
    stored = bk // 2 if fmt == 4 else bk
    operand, tma = values, bool(sizes.get("tma")) and _describable(values)
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        operand = TensorDescriptor.from_tensor(values.view(-1, values.shape[-1]), [sizes["bn"], stored])
    options = {"K": layer.k, "BN": sizes["bn"], "BK": bk, "FMT": fmt, "TMA": tma, "ROUND": layer.rounds}
    return operand, scales, options | {"num_warps": sizes["warps"], "num_stages": sizes["stages"]}


def _tiling(layer: Layer, sizes: Blocks) -> dict[str, Any]:
    return {"BM": layer.blocks["bm"], "GROUP": sizes["group"], "SWAP": layer.path == "skinny"}


def _describable(values: Tensor) -> bool:
    """Tensor descriptors want rows of whole 16-byte units; other shapes are read through pointers, to the same bits."""
    return values.shape[-1] * values.element_size() % 16 == 0 and values.data_ptr() % 16 == 0


def _dense(tensor: Tensor | None) -> Tensor | None:
    """As a kernel reads it: contiguous, and bool as bytes."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _row_stride(tensor: Tensor | None) -> int:
    return tensor.shape[-1] if tensor is not None and tensor.ndim == 2 else 0


def _power(n: int) -> int:
    return max(16, triton.next_power_of_2(n))
