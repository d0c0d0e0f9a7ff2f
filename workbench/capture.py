"""From a model to frames: greedy answers, then one pass over each whole conversation that records its routing.

Answers are written with a key-value cache; routing is read afterwards from a single teacher-forced pass, so that every
token, given or written, is seen the same way and in one batch shape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from workbench.config import Qwen3MoeConfig
from workbench.errors import ConfigError, ShapeError
from workbench.hooks import HookPoint
from workbench.models import Llama
from workbench.models.recording import router_entropy, router_margin

PAD_ID = 4
SMALL_MODEL = 50_000_000  # parameters
BLOCK = 4096  # values per checksum in weights_hash
_POINTS = ("hook_router_logits", "hook_expert_ids", "hook_routing_weights")


@dataclass(frozen=True)
class Routing:
    """Routing of a batch of sequences at its real tokens, sequence after sequence, padding gone.

    layers: the routed layers; n_experts: in each of them. expert_ids, routing_weights [token layer k] by descending
    weight; router_entropy [token layer] in nats, of the softmax over all experts; router_margin [token layer], the k-th
    minus the (k+1)-th router logit, NaN when every expert is always chosen.
    """

    layers: tuple[int, ...]
    n_experts: int
    expert_ids: np.ndarray
    routing_weights: np.ndarray
    router_entropy: np.ndarray
    router_margin: np.ndarray

    def frame(self, doc_id: Sequence[str], pos: Sequence[int]) -> pl.DataFrame:
        """One row per (token, layer) with axes.ROUTING_COLUMNS; `doc_id` and `pos` have one entry per token."""
        n_layers, k = len(self.layers), self.expert_ids.shape[-1]
        margin = pl.Series("router_margin", self.router_margin.ravel())
        return pl.DataFrame(
            {
                "doc_id": np.repeat(np.asarray(doc_id, dtype=object), n_layers).tolist(),
                "pos": np.repeat(np.asarray(pos, dtype=np.int32), n_layers),
                "layer": np.tile(np.asarray(self.layers, dtype=np.int16), len(pos)),
                "expert_ids": pl.Series(self.expert_ids.reshape(-1, k)).arr.to_list(),
                "routing_weights": pl.Series(self.routing_weights.reshape(-1, k)).arr.to_list(),
                "router_entropy": self.router_entropy.ravel(),
                "router_margin": margin.fill_nan(None),
            }
        )

    def load(self, cells: Sequence[tuple[int, int]], shape: tuple[int, int]) -> np.ndarray:
        """Token-slots [lang segment layer expert]: each token counts k times in its cell (lang, segment) of `shape`."""
        n_layers, n_experts = len(self.layers), self.n_experts
        flat = np.ravel_multi_index(np.asarray(cells).T, shape)[:, None, None]  # [token 1 1]
        place = (flat * n_layers + np.arange(n_layers)[:, None]) * n_experts + self.expert_ids
        counts = np.bincount(place.ravel(), minlength=shape[0] * shape[1] * n_layers * n_experts)
        return counts.reshape(*shape, n_layers, n_experts)


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
def capture_routing(model: Llama, sequences: Sequence[Sequence[int]]) -> Routing:
    """One forward pass over the sequences (token ids), reading the router of every routed layer."""
    layers = routed_layers(model)
    check_room(model, sequences, 0)
    tokens, mask = pad(sequences, left=False)
    reader = _RouterReader(mask.bool())
    names = [f"blocks.{layer}.mlp.{point}" for layer in layers for point in _POINTS]
    with model.hooks(fwd_hooks=[(name, reader) for name in names]):
        model(tokens.to(model.device), mask.to(model.device), stop_at_layer=model.cfg.n_layers)
    return Routing(layers, reader.n_experts, *(np.stack(reader.found[name], axis=1) for name in reader.found))


class _RouterReader:
    """A hook that keeps, layer after layer, what a Routing holds, at real tokens only."""

    def __init__(self, real: Tensor) -> None:
        self.real = real
        names = ("expert_ids", "routing_weights", "router_entropy", "router_margin")
        self.found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self._logits = torch.empty(0)
        self.n_experts = 0

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        at_tokens = tensor[self.real.to(tensor.device)]  # [token ...]
        if hook.name.endswith("hook_router_logits"):
            self._logits, self.n_experts = at_tokens.float(), at_tokens.shape[-1]
        elif hook.name.endswith("hook_expert_ids"):
            self._keep("expert_ids", at_tokens.to(torch.int16))
            self._keep("router_entropy", router_entropy(self._logits))
            self._keep("router_margin", router_margin(self._logits, at_tokens.shape[-1]))
        else:
            self._keep("routing_weights", at_tokens.float())

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
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        step = -(-flat.numel() // sample)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
        if step > 1:
            digest.update(_block_sums(flat).cpu().numpy().tobytes())
    return digest.hexdigest()


def _block_sums(flat: Tensor) -> Tensor:  # [value] -> int64 [block]
    bits = flat.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    whole = bits[: len(bits) // BLOCK * BLOCK].view(-1, BLOCK).sum(1, dtype=torch.int64)
    return torch.cat((whole, bits[len(whole) * BLOCK :].sum(dtype=torch.int64)[None]))
