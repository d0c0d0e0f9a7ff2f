"""The experts of one layer, applied to the tokens that were routed to them, in plain torch.

Legend: T tokens, D d_model, F d_expert, E experts, K slots per token, N = T·K routed rows.
A *slot* is one (token, rank) pair; slot order is the order of expert_ids.reshape(N).

Three implementations of one grouped linear map, chosen by name and never swapped silently:
  sorted      rows sorted by expert, one matrix product per expert that was hit; the default on CPU
  grouped_mm  the same rows through torch.nn.functional.grouped_mm; the default for bfloat16 on CUDA
  reference   each row times its own expert's matrix, gathered: slow, and plain enough to be the oracle

On a CPU without bfloat16 arithmetic, `sorted` widens an expert's matrix to float32 where it has four rows or more: the
product is rounded to the model's dtype all the same, and is several times faster. Where torch has that loop over
experts in C++ (its grouped_mm, float32 on CPU), `sorted` leaves the looping to it: the same products in the same order.
But not while decoding: that loop visits every expert, and for a few rows most of them have none. Where matrices are
small and tokens four at most, putting slots in order costs more than it saves: each slot has a product of its own.
int8 and int4 experts are dequantised one at a time as they are hit (by `sorted`) or all at once (by `reference`);
`grouped_mm` cannot run them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.quant import QuantizedExperts

Tap = Callable[[Tensor], Tensor]
Weight = Tensor | QuantizedExperts
TAPS = ("expert_pre", "expert_pre_linear", "expert_post", "expert_out")
_WIDENED_ROWS = 4  # from here on widening the matrix once costs less than multiplying in bfloat16
_FEW_ROWS = 64  # up to here looping over the experts that were hit costs less than visiting all of them
_FEW_TOKENS = 4  # up to here a product for each slot costs less than sorting slots by expert,
_SMALL = 1 << 17  # bytes of an expert's matrix up to which reading it again for a slot that shares it costs little


@dataclass(frozen=True)
class Groups:
    """The slots sorted by expert; ties keep slot order, so bits repeat. Or as they are, each a group `apart`."""

    sorted_ids: Tensor  # int64 [N]; more than there are slots once experts were filled up
    order: Tensor  # int64 [N], sorted row -> slot
    n_experts: int
    apart: bool = False
    as_transformers: bool = False  # no widening
    places: Tensor | None = None  # int64 [slot]: where its row went, once experts were filled up to equal numbers

    @classmethod
    def of(
        cls, ids: Tensor, weight: Weight, impl: str, as_transformers: bool, rows_per_expert: int | None = None
    ) -> Groups:
        n_experts, flat = weight.shape[0], ids.reshape(-1)
        if impl == "sorted" and rows_per_expert is None and 0 < ids.shape[0] <= (_FEW_TOKENS if _small(weight) else 1):
            return cls(flat, torch.arange(flat.numel(), device=ids.device), n_experts, True, as_transformers)
        sorted_ids, order = flat.sort(stable=True)
        if rows_per_expert is None:
            return cls(sorted_ids, order, n_experts, False, as_transformers)
        return cls._filled(sorted_ids, order, n_experts, as_transformers, rows_per_expert)

    @classmethod
    def _filled(cls, sorted_ids: Tensor, order: Tensor, n_experts: int, as_transformers: bool, n_rows: int) -> Groups:
        """Each expert that was hit gets a multiple of `n_rows`; copies of the first slot's row fill the places left."""
        counts = torch.bincount(sorted_ids, minlength=n_experts)
        room = (counts + n_rows - 1) // n_rows * n_rows  # [E]
        shift = (room.cumsum(0) - room) - (counts.cumsum(0) - counts)  # [E], how far an expert's rows move
        moved = torch.arange(order.numel(), device=order.device) + shift[sorted_ids]
        filled = order.new_zeros(int(room.sum())).index_copy_(0, moved, order)
        places = torch.empty_like(order).index_copy_(0, order, moved)
        owners = torch.arange(n_experts, device=order.device).repeat_interleave(room)
        return cls(owners, filled, n_experts, False, as_transformers, places)

    @functools.cached_property
    def back(self) -> Tensor:  # int64 [slot], slot -> sorted row
        if self.apart:
            return self.order
        if self.places is not None:
            return self.places
        rows = torch.arange(self.order.numel(), device=self.order.device)
        return torch.empty_like(self.order).index_copy_(0, self.order, rows)

    @functools.cached_property
    def hit(self) -> tuple[list[int], list[int]]:
        """Experts with rows, and how many; waits for the device."""
        if self.apart:
            return self.sorted_ids.tolist(), [1] * self.sorted_ids.numel()
        counts = torch.bincount(self.sorted_ids, minlength=self.n_experts).tolist()
        experts = [expert for expert, count in enumerate(counts) if count]
        return experts, [counts[expert] for expert in experts]

    @functools.cached_property
    def ends(self) -> Tensor:  # int32 [E], without a wait for the device
        experts = torch.arange(self.n_experts, device=self.order.device)
        return torch.searchsorted(self.sorted_ids, experts, right=True).to(torch.int32)


def routed_experts(
    x: Tensor,  # [T, D]
    expert_ids: Tensor,  # [T, K] int64
    routing_weights: Tensor,  # [T, K]
    gate_up: Weight,  # [E, 2F, D], gate rows before up rows
    down: Weight,  # [E, D, F]
    *,
    impl: str = "sorted",
    taps: Mapping[str, Tap] | None = None,
    numerics: str = "trained",
    rows_per_expert: int | None = None,
) -> Tensor:  # [T, D]
    """Sum over the K slots of weight · down(silu(gate x) * up x), each slot with its own expert's matrices.

    `taps` see, and may replace, the routed activations in slot order [T, K, ...]: `expert_pre` and
    `expert_pre_linear` (gate and up projections), `expert_post` (their product after silu), `expert_out` (before
    weighting). A tap that returns its argument changes no bit. Weights of higher precision than x make the weighted
    sum in that precision; the result has x's dtype. numerics "hf" rounds as transformers' grouped_mm does: matrix
    products in x's dtype only, and each weighted output, in the wider precision of the two, before they are added.
    `rows_per_expert` fills every expert that was hit up to a multiple of so many rows: with that of T, which no expert
    exceeds, a token's bits do not depend on what the others chose.
    Differentiable in every floating argument. Raises ValueError for quantised experts, and for rows that are no
    multiple of 16 bytes, with grouped_mm.
    """
    taps, as_transformers = taps or {}, numerics == "hf"
    groups = Groups.of(expert_ids, gate_up, impl, as_transformers, rows_per_expert)

    def tap(name: str, rows: Tensor) -> Tensor:
        if name not in taps:
            return rows
        slots = taps[name](rows[groups.back].unflatten(0, expert_ids.shape))
        return slots.flatten(0, 1)[groups.order]

    linear = _LINEARS[impl]
    k = expert_ids.shape[1]
    rows = x.repeat_interleave(k, 0) if groups.apart else x.index_select(0, groups.order // k)  # [N, D]
    gate_up_rows = linear(rows, gate_up, groups)  # [N, 2F]
    if "expert_pre" in taps or "expert_pre_linear" in taps:
        # back into one tensor: silu rounds its last bit by memory layout, and a tap must not change a bit
        gate, up = gate_up_rows.chunk(2, dim=-1)
        gate_up_rows = torch.cat((tap("expert_pre", gate), tap("expert_pre_linear", up)), dim=-1)
    gate, up = gate_up_rows.chunk(2, dim=-1)  # [N, F] each
    hidden = F.silu(gate) * up
    out = linear(tap("expert_post", hidden), down, groups)  # [N, D]
    if "expert_out" not in taps:
        return _mix(out, groups.back.view_as(expert_ids), routing_weights, as_transformers, groups.apart).to(x.dtype)
    slots = taps["expert_out"](out[groups.back].unflatten(0, expert_ids.shape))  # [T, K, D]
    in_place = torch.arange(expert_ids.numel(), device=x.device).view_as(expert_ids)
    return _mix(slots.flatten(0, 1), in_place, routing_weights, as_transformers, groups.apart).to(x.dtype)


def _mix(
    rows: Tensor, places: Tensor, weights: Tensor, as_transformers: bool, in_order: bool
) -> Tensor:  # [N, D], [T, K], [T, K]
    """[T, D]: the weighted sum of each token's rows, which lie at `places`, in the wider of the two precisions."""
    wide = torch.promote_types(rows.dtype, weights.dtype)
    if as_transformers or weights.device.type != "cpu" or wide not in (torch.float32, torch.float64):
        return (rows[places] * weights.unsqueeze(-1)).sum(dim=1)
    if in_order:  # a token's rows lie together
        return torch.bmm(weights.to(wide).unsqueeze(1), rows.to(wide).unflatten(0, weights.shape)).squeeze(1)
    # one pass over the rows, without [T, K, D] in between
    bags = torch.arange(0, places.numel(), places.shape[1])  # where a token's slots begin
    summed = torch.embedding_bag(
        rows.to(wide), places.flatten(), bags, mode=0, per_sample_weights=weights.to(wide).flatten()
    )
    return summed[0]


def _linear_sorted(rows: Tensor, weight: Weight, groups: Groups) -> Tensor:
    experts, counts = groups.hit
    may_widen = _may_widen(rows) and not groups.as_transformers
    widened = [may_widen and count >= _WIDENED_ROWS for count in counts]
    learns = isinstance(weight, Tensor) and weight.requires_grad
    with_graph = torch.is_grad_enabled() and (rows.requires_grad or learns)
    if isinstance(weight, Tensor) and not (with_graph or any(widened)):
        if 0 < rows.shape[0] <= _FEW_ROWS:
            return _linear_few(rows, weight, experts, counts)
        if not groups.apart and _loops_in_torch(rows, weight):
            return F.grouped_mm(rows, weight.transpose(1, 2), offs=groups.ends)
    matrices = _matrices(weight, experts, widened, with_graph, rows.dtype)
    products = zip(rows.split(counts), matrices, widened, strict=True)
    if with_graph:
        parts = [_product(*product) for product in products]
        return torch.cat(parts) if parts else rows.new_empty(0, weight.shape[1])
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for (part, matrix, wide), place in zip(products, out.split(counts), strict=True):
        if wide:
            place.copy_(_product(part, matrix, wide))
        else:
            torch.mm(part, matrix.T, out=place)
    return out


def _linear_few(rows: Tensor, weight: Tensor, experts: list[int], counts: list[int]) -> Tensor:
    """One product per expert that was hit, in the cheapest call: for so few rows calls are much of the time."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    matrices = _kept(weight) or weight.transpose(1, 2)  # [E, in, out]
    for part, place, expert in zip(rows.split_with_sizes(counts), out.split_with_sizes(counts), experts, strict=True):
        torch.mm(part, matrices[expert], out=place)
    return out


_KEPT: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}


@contextmanager
def matrices_kept(weights: Iterable[Weight]) -> Iterator[None]:
    """Inside the block, each expert's matrix in these weights lies ready, and is not looked up for every product.

    Views, so that edits in place show. It changes what calls cost, and no bit.
    """
    views = {}
    for weight in weights:
        if isinstance(weight, Tensor):
            whole = weight.detach()
            views[id(weight)] = whole, whole.transpose(1, 2).unbind()
    _KEPT.update(views)
    try:
        yield
    finally:
        for key, kept in views.items():
            if _KEPT.get(key) is kept:
                del _KEPT[key]


def _kept(weight: Tensor) -> tuple[Tensor, ...] | None:  # [in, out] of each expert
    whole, matrices = _KEPT.get(id(weight), (None, ()))
    # not when other data was put behind the parameter
    return matrices if whole is not None and whole.dtype == weight.dtype and whole.is_set_to(weight) else None


def _matrices(
    weight: Weight, experts: list[int], widened: list[bool], with_graph: bool, dtype: torch.dtype
) -> Iterable[Tensor]:
    """The matrix of each expert that was hit, one at a time."""
    if isinstance(weight, QuantizedExperts):
        dtypes = (torch.float32 if wide else dtype for wide in widened)
        return (weight.dequantize(expert, wanted) for expert, wanted in zip(experts, dtypes, strict=True))
    # unbind, not indexing: its backward writes one gradient for all experts instead of one full tensor for each
    every = weight.unbind() if with_graph else weight
    return (every[expert] for expert in experts)


def _product(rows: Tensor, matrix: Tensor, wide: bool) -> Tensor:
    """rows · matrixᵀ in the dtype of rows, rounded once."""
    return (rows.float() @ matrix.float().T).to(rows.dtype) if wide else rows @ matrix.T


def _may_widen(rows: Tensor) -> bool:
    half = rows.dtype in (torch.bfloat16, torch.float16)
    return half and rows.device.type == "cpu" and not _multiplies_halves()


def _small(weight: Weight) -> bool:
    return isinstance(weight, Tensor) and weight.shape[1] * weight.shape[2] * weight.element_size() <= _SMALL


def _loops_in_torch(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's CPU grouped_mm, a loop over experts in C++, takes these; it wants rows of whole 16-byte units."""
    fits = all(tensor.shape[-1] % 4 == 0 and tensor.data_ptr() % 16 == 0 for tensor in (rows, weight))
    return fits and rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.shape[0] > 0


@functools.cache
def _multiplies_halves() -> bool:
    """Whether this CPU has matrix or dot-product units for bfloat16; as torch tells, which asks x86 alone."""
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2", "AVX512"):
        return True
    found = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(supported() for supported in found if supported is not None)


def _linear_grouped_mm(rows: Tensor, weight: Weight, groups: Groups) -> Tensor:
    if isinstance(weight, QuantizedExperts):
        raise ValueError(f"moe_impl: expected triton or sorted for int{weight.bits} experts, got 'grouped_mm'.")
    if (n_bytes := weight.shape[2] * weight.element_size()) % 16:
        raise ValueError(
            "d_model, d_expert: expected rows of a multiple of 16 bytes for 'grouped_mm', "
            f"got {n_bytes}. Use moe_impl='sorted'."
        )
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=groups.ends)


def _linear_reference(rows: Tensor, weight: Weight, groups: Groups) -> Tensor:
    whole = weight.dequantize(dtype=rows.dtype) if isinstance(weight, QuantizedExperts) else weight
    return torch.einsum("ni,noi->no", rows, whole[groups.sorted_ids])


_LINEARS: dict[str, Callable[[Tensor, Weight, Groups], Tensor]] = {
    "sorted": _linear_sorted, "grouped_mm": _linear_grouped_mm, "reference": _linear_reference,
}  # fmt: skip
