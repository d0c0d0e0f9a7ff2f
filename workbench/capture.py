"""From a model to frames: greedy answers, then one pass over each whole conversation that records its routing.

Answers are written with a key-value cache; routing is read afterwards from a single teacher-forced pass, so that every
token, given or written, is seen the same way and in one batch shape.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import polars as pl
import torch
from torch import Tensor

from workbench.config import Qwen3MoeConfig
from workbench.errors import ConfigError, ShapeError
from workbench.hooks import HookPoint
from workbench.models import Llama
from workbench.models.recording import routing_values

PAD_ID = 4
SMALL_MODEL = 50_000_000  # parameters
BLOCK = 4096  # values per checksum in weights_hash
_POINTS = ("mlp.hook_router_logits", "mlp.hook_expert_ids", "mlp.hook_routing_weights")
_NORM_POINTS = ("ln2.hook_normalized", "mlp.hook_expert_out", "hook_mlp_out")


@dataclass(frozen=True)
class Routing:
    """Routing of a batch of sequences at its real tokens, sequence after sequence, padding gone.

    layers: the routed layers; n_experts: in each of them. expert_ids, routing_weights [token layer k] by descending
    weight; router_entropy [token layer] in nats, of the softmax over all experts; router_margin [token layer], the k-th
    minus the (k+1)-th router logit, NaN when every expert is always chosen; router_lse, router_mass [token layer], see
    axes.ROUTING_COLUMNS. Only if asked for: router_logits [token layer expert]; expert_norms [token layer k],
    mlp_in_norm and mlp_out_norm [token layer].
    """

    layers: tuple[int, ...]
    n_experts: int
    expert_ids: np.ndarray
    routing_weights: np.ndarray
    router_entropy: np.ndarray
    router_margin: np.ndarray
    router_lse: np.ndarray
    router_mass: np.ndarray
    router_logits: np.ndarray | None = None
    expert_norms: np.ndarray | None = None
    mlp_in_norm: np.ndarray | None = None
    mlp_out_norm: np.ndarray | None = None

    def frame(self, doc_id: Sequence[str], pos: Sequence[int]) -> pl.DataFrame:
        """One row per (token, layer) with axes.ROUTING_COLUMNS; `doc_id` and `pos` have one entry per token."""
        n_layers = len(self.layers)
        margin = pl.Series("router_margin", self.router_margin.ravel())
        return pl.DataFrame(
            {
                "doc_id": np.repeat(np.asarray(doc_id, dtype=object), n_layers).tolist(),
                "pos": np.repeat(np.asarray(pos, dtype=np.int32), n_layers),
                "layer": np.tile(np.asarray(self.layers, dtype=np.int16), len(pos)),
                "expert_ids": _lists(self.expert_ids),
                "routing_weights": _lists(self.routing_weights),
                "router_entropy": self.router_entropy.ravel(),
                "router_margin": margin.fill_nan(None),
                "router_lse": self.router_lse.ravel(),
                "router_mass": self.router_mass.ravel(),
                "expert_norms": None if self.expert_norms is None else _lists(self.expert_norms),
                "mlp_in_norm": None if self.mlp_in_norm is None else self.mlp_in_norm.ravel(),
                "mlp_out_norm": None if self.mlp_out_norm is None else self.mlp_out_norm.ravel(),
            }
        )

    def load(self, cells: Sequence[tuple[int, int]], shape: tuple[int, int]) -> np.ndarray:
        """Token-slots [lang segment layer expert]: each token counts k times in its cell (lang, segment) of `shape`."""
        n_layers, n_experts = len(self.layers), self.n_experts
        flat = np.ravel_multi_index(np.asarray(cells).T, shape)[:, None, None]  # [token 1 1]
        place = (flat * n_layers + np.arange(n_layers)[:, None]) * n_experts + self.expert_ids
        counts = np.bincount(place.ravel(), minlength=shape[0] * shape[1] * n_layers * n_experts)
        return counts.reshape(*shape, n_layers, n_experts)


def _lists(values: np.ndarray) -> pl.Series:  # [token layer k] -> one list of k per token and layer
    return pl.Series(values.reshape(-1, values.shape[-1])).arr.to_list()


def routed_layers(model: Llama) -> tuple[int, ...]:
    """The layers that have experts. Raises ConfigError when there are none, and so nothing to route."""
    if not isinstance(model.cfg, Qwen3MoeConfig):
        raise ConfigError(
            f"model: expected a mixture of experts, got {model.cfg.model_type!r}, which is dense and has no router. "
            "Pass one with experts, such as nano-moe-thinking."
        )
    layers = tuple(layer for layer, sparse in enumerate(model.cfg.sparse_layers) if sparse)
    if not layers:
        raise ConfigError(
            "model: expected a layer with experts, got dense ones only. Check mlp_only_layers and decoder_sparse_step."
        )
    return layers


@torch.inference_mode()
def write_answers(
    model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int] | None = None
) -> list[list[int]]:
    """The greedy continuation of each prompt (token ids), at most `max_new_tokens` long.

    It ends with the first of `stop_ids`, by default the model's own.
    """
    if max_new_tokens == 0:
        return [[] for _ in prompts]
    check_room(model, prompts, max_new_tokens)
    tokens, mask = pad(prompts, left=True)
    result = model.generate(
        tokens.to(model.device), mask.to(model.device), max_new_tokens=max_new_tokens, stop_ids=stop_ids, pad_id=PAD_ID
    )
    return list(result.continuations())


@torch.inference_mode()
def capture_routing(
    model: Llama, sequences: Sequence[Sequence[int]], router_logits: bool = False, norms: bool = False
) -> Routing:
    """One forward pass over the sequences (token ids), reading the router of every routed layer.

    `router_logits` keeps those of all experts (4 bytes per token, layer and expert), `norms` how much each chosen
    expert adds, for which every expert output is held once in slot order (token·k·d_model values per layer).
    """
    layers = routed_layers(model)
    check_room(model, sequences, 0)
    tokens, mask = pad(sequences, left=False)
    reader = _RouterReader(mask.bool(), router_logits)
    points = (*_POINTS, *_NORM_POINTS) if norms else _POINTS
    names = [f"blocks.{layer}.{point}" for layer in layers for point in points]
    with model.hooks(fwd_hooks=[(name, reader) for name in names]):
        model(tokens.to(model.device), mask.to(model.device), stop_at_layer=model.cfg.n_layers)
    found = {name: np.stack(parts, axis=1) for name, parts in reader.found.items()}
    return Routing(layers, reader.n_experts, **found)


@torch.inference_mode()
def expert_peaks(model: Llama, sequences: Sequence[Sequence[int]]) -> pl.DataFrame:
    """The largest absolute component of any output of every expert, before weighting: columns layer, expert, peak.

    BOS and every other real token count; an expert that was never chosen has peak 0. Super experts stand out in it
    (arXiv 2507.23279; `stats.contribution.super_experts`). Holds every expert output once in slot order.
    """
    layers = routed_layers(model)
    peaks = torch.zeros(model.cfg.n_layers, getattr(model.cfg, "n_experts", 0))
    real, chosen = torch.empty(0), torch.empty(0)

    def read(tensor: Tensor, hook: HookPoint) -> None:
        nonlocal chosen
        at_tokens = tensor[real]
        if hook.name.endswith("hook_expert_ids"):
            chosen = at_tokens  # [token k]
        else:
            largest = at_tokens.float().abs().amax(-1).flatten().cpu()  # [token·k]
            peaks[hook_layer(hook)].scatter_reduce_(0, chosen.flatten().cpu(), largest, "amax")

    names = [f"blocks.{layer}.mlp.{point}" for layer in layers for point in ("hook_expert_ids", "hook_expert_out")]
    tokens, mask = pad(sequences, left=False)
    real = mask.bool().to(model.device)
    with model.hooks(fwd_hooks=[(name, read) for name in names]):
        model(tokens.to(model.device), mask.to(model.device), stop_at_layer=model.cfg.n_layers)
    found = [(layer, expert, float(peak)) for layer in layers for expert, peak in enumerate(peaks[layer])]
    return pl.DataFrame(found, schema=["layer", "expert", "peak"], orient="row")


@torch.inference_mode()
def router_inputs(model: Llama, doc_ids: Sequence[str], sequences: Sequence[Sequence[int]]) -> pl.DataFrame:
    """Mean router input of each sequence: columns doc_id, layer, mean_in (list of d_model), for `geometry_baseline`."""
    layers = routed_layers(model)
    tokens, mask = pad(sequences, left=False)
    real = mask.to(model.device)
    means: dict[int, Tensor] = {}

    def read(tensor: Tensor, hook: HookPoint) -> None:  # [batch pos d_model]
        summed = (tensor.float() * real[..., None]).sum(1)
        means[hook_layer(hook)] = (summed / real.sum(1, keepdim=True)).cpu()

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.ln2.hook_normalized", read) for layer in layers]):
        model(tokens.to(model.device), real, stop_at_layer=model.cfg.n_layers)
    rows = [(doc_id, layer, means[layer][row].tolist()) for row, doc_id in enumerate(doc_ids) for layer in layers]
    return pl.DataFrame(rows, schema=["doc_id", "layer", "mean_in"], orient="row")


def hook_layer(hook: HookPoint) -> int:
    """The layer of a hook point of a block."""
    return int(hook.name.split(".")[1])


class _RouterReader:
    """A hook that keeps, layer after layer, what a Routing holds, at real tokens only."""

    def __init__(self, real: Tensor, keep_logits: bool) -> None:
        self.real, self.keep_logits = real, keep_logits
        self.found: dict[str, list[np.ndarray]] = defaultdict(list)
        self._logits = self._ids = self._weights = torch.empty(0)
        self.n_experts = 0

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        at_tokens = tensor[self.real.to(tensor.device)]  # [token ...]
        if hook.name.endswith("hook_router_logits"):
            self._logits, self.n_experts = at_tokens.float(), at_tokens.shape[-1]
        elif hook.name.endswith("hook_expert_ids"):
            self._ids = at_tokens
        elif hook.name.endswith("hook_routing_weights"):
            self._weights = at_tokens.float()
            for name, values in routing_values(self._logits, self._ids, self._weights).items():
                self._keep(name, values)
            if self.keep_logits:
                self._keep("router_logits", self._logits)
        elif hook.name.endswith("hook_expert_out"):
            self._keep("expert_norms", self._weights * at_tokens.float().norm(dim=-1))  # [token k]
        else:
            name = "mlp_out_norm" if hook.name.endswith("hook_mlp_out") else "mlp_in_norm"
            self._keep(name, at_tokens.float().norm(dim=-1))

    def _keep(self, name: str, values: Tensor) -> None:
        self.found[name].append(values.cpu().numpy())


@contextmanager
def suitable_threads(model: Llama) -> Iterator[None]:
    """One thread while a small model runs on a CPU, torch's own choice for any other.

    Matrices that small are not worth sharing, and where something else keeps a core busy the threads wait for each
    other at every one of them: measured 10 times slower with two threads than with one.
    """
    before = torch.get_num_threads()
    small = model.device.type == "cpu" and model.cfg.n_params < SMALL_MODEL
    try:
        torch.set_num_threads(1 if small else before)
        yield
    finally:
        torch.set_num_threads(before)


def pad(sequences: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [batch pos] of sequences of any lengths."""
    width = max(map(len, sequences))
    gaps = [width - len(sequence) for sequence in sequences]
    before = [gap if left else 0 for gap in gaps]
    tokens = torch.full((len(sequences), width), PAD_ID)
    mask = torch.zeros_like(tokens)
    for row, (sequence, start) in enumerate(zip(sequences, before, strict=True)):
        tokens[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask[row, start : start + len(sequence)] = 1
    return tokens, mask


def check_room(model: Llama, sequences: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises ShapeError when a sequence is empty, or too long to leave room for `max_new_tokens`."""
    if max_new_tokens >= model.cfg.n_ctx:
        raise ShapeError(
            f"max_new_tokens: expected fewer than the context's {model.cfg.n_ctx} tokens, which hold the prompt too, "
            f"got {max_new_tokens}. Pass a smaller --max-new-tokens."
        )
    shortest, longest = min(map(len, sequences), default=0), max(map(len, sequences), default=0)
    room = model.cfg.n_ctx - max_new_tokens
    if shortest == 0 or longest > room:
        raise ShapeError(
            f"sequences: expected 1 to {room} tokens ({model.cfg.n_ctx} less {max_new_tokens} to write), "
            f"got {shortest if shortest == 0 else longest}. Shorten the prompt or --max-new-tokens."
        )


def weights_hash(model: Llama, sample: int = 1 << 20) -> str:
    """SHA-256 over every parameter's name, shape, dtype and values, whatever the layout of its files.

    Of a parameter with more than `sample` values, that many count one by one, evenly spaced, and all others through the
    sums of their bits over blocks of BLOCK values: a 32B model takes seconds, and no single change stays unseen.
    """
    digest = hashlib.sha256()
    for name, parameter in chain(model.named_parameters(), model.named_buffers()):  # quantised experts are buffers
        flat = parameter.detach().reshape(-1)
        step = -(-flat.numel() // sample)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
        if step > 1:
            digest.update(_block_sums(flat).cpu().numpy().tobytes())
    return digest.hexdigest()


def _block_sums(flat: Tensor) -> Tensor:  # [value] -> int64 [block]
    bits = flat.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    whole = bits[: len(bits) // BLOCK * BLOCK].view(-1, BLOCK).sum(1, dtype=torch.int64)
    return torch.cat((whole, bits[len(whole) * BLOCK :].sum(dtype=torch.int64)[None]))
