"""Remove or force experts, and measure what that does to every document's next-token distribution.

An `Edit` names experts of one layer, and at which tokens. `run_edits` runs any number of them over the same documents:
the layers below an edit are computed once, so an edit costs only the layers from its own upwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

from workbench.capture import check_room, pad, routed_layers, suitable_threads
from workbench.errors import ConfigError
from workbench.hooks import HookFn, HookPoint
from workbench.interventions.where import told
from workbench.models import Llama
from workbench.stats.load import CONTENT_SEGMENTS

KINDS = ("drop", "reroute", "force")


@dataclass(frozen=True, eq=False)
class Edit:
    """An intervention on the experts of one layer, at every token or at some.

    kind "drop" sets the routing weight of the experts to 0 and leaves the other weights as they are, so a token that
    did not choose them is unchanged; "reroute" sets their router logits to -inf, so that the next best experts step in
    and weights are renormalised; "force" raises each one's logit just above the largest (SteerMoE, arXiv 2509.09660).
    at: for each expert the tokens, as rows of the documents' tokens frame, or None for all of them.
    """

    kind: str
    layer: int
    experts: tuple[int, ...]
    at: tuple[np.ndarray | None, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}. Pass one of them.")
        if not self.at:
            object.__setattr__(self, "at", (None,) * len(self.experts))


@dataclass(frozen=True)
class Outcome:
    """What edits did, per document: arrays [edit doc] in order of the edits and of `docs`.

    d_nll: change of the mean negative log-likelihood of content tokens, nats per token; kl: mean KL(before || after) of
    the next-token distribution at content tokens, nats. docs: one row per document with doc_id, group_id, lang.
    """

    docs: pl.DataFrame
    d_nll: np.ndarray
    kl: np.ndarray


def routing_of(model: Llama, tokens: pl.DataFrame, batch_size: int = 16) -> np.ndarray:
    """Experts chosen without an edit: bool [token layer expert], tokens as in the frame, layers as in the model.

    Layers without experts are all False.
    """
    layers, n_experts = routed_layers(model), count_experts(model)
    chosen = np.zeros((len(tokens), model.cfg.n_layers, n_experts), dtype=np.bool_)
    for batch in _batches(model, tokens, batch_size):
        for layer in layers:
            picked = np.zeros((len(batch.rows), n_experts), dtype=np.bool_)
            np.put_along_axis(picked, batch.expert_ids[layer][batch.real].numpy(), True, axis=-1)
            chosen[batch.rows, layer] = picked
    return chosen


def run_edits(
    model: Llama, tokens: pl.DataFrame, edits: Sequence[Edit], batch_size: int = 16, progress: bool = False
) -> Outcome:
    """Run every edit over the documents of a tokens frame (axes.TOKEN_COLUMNS, rows of a document together, by pos).

    Raises ConfigError for a layer without experts or an expert that does not exist.
    """
    _check(model, edits)
    docs = tokens.group_by("doc_id", maintain_order=True).agg(pl.col("group_id", "lang").first())
    d_nll, kl = np.zeros((2, len(edits), len(docs)))
    n_batches = -(-len(docs) // batch_size)
    with tqdm(total=n_batches * len(edits), desc="audit", unit="pass", disable=None if progress else True) as bar:
        for number, batch in enumerate(_batches(model, tokens, batch_size)):
            here = slice(number * batch_size, number * batch_size + len(batch.ids))
            for place, edit in enumerate(edits):
                d_nll[place, here], kl[place, here] = batch.effect(model, edit)
                bar.update()
    return Outcome(docs, d_nll, kl)


class _Batch:
    """Some documents: their tokens, what enters every layer, the experts chosen, and the unedited predictions."""

    @torch.inference_mode()
    def __init__(self, model: Llama, documents: Sequence[Sequence[int]], content: np.ndarray, rows: np.ndarray) -> None:
        self.rows = rows  # of the tokens frame
        ids, mask = pad(documents, left=False)
        self.ids, self.mask = ids.to(model.device), mask.to(model.device)  # [batch pos]
        self.real = mask.bool()
        is_content = torch.zeros_like(self.real).masked_scatter(self.real, torch.from_numpy(content))
        next_is = torch.cat(
            (is_content[:, 1:], torch.zeros_like(is_content[:, :1])), dim=1
        )  # the token after is content
        self.used = (is_content | next_is).to(model.device)  # the vocabulary is wide: logits of these positions alone
        self.content, self.following = (part.to(model.device)[self.used] for part in (is_content, next_is))  # [row]
        self.doc = self.used.nonzero()[:, 0]  # [row]
        self.target = self.ids.roll(-1, dims=1)[self.used]  # [row]
        layers = routed_layers(model)
        names = [f"blocks.{layer}.{point}" for layer in layers for point in ("hook_resid_pre", "mlp.hook_expert_ids")]
        resid, cache = model.run_with_cache(
            self.ids, names_filter=names, attention_mask=self.mask, stop_at_layer=model.cfg.n_layers
        )
        self.resid = {layer: cache["resid_pre", layer] for layer in layers}
        self.expert_ids = {layer: cache["expert_ids", layer].cpu() for layer in layers}
        self.log_probs = self._log_probs(model, resid)  # [row d_vocab]
        self.probs, self.nll = self.log_probs.exp(), self._nll(self.log_probs)

    @torch.inference_mode()
    def effect(self, model: Llama, edit: Edit) -> tuple[np.ndarray, np.ndarray]:
        hook = _hook(edit, self._mask_of(edit, count_experts(model)), self.expert_ids[edit.layer])
        with told(model, self.ids, self.mask), model.hooks([hook]):
            resid = model(
                self.resid[edit.layer], self.mask, start_at_layer=edit.layer, stop_at_layer=model.cfg.n_layers
            )
        log_probs = self._log_probs(model, resid)
        kl = (self.probs * (self.log_probs - log_probs)).sum(-1)  # [row]
        d_nll = self._nll(log_probs) - self.nll
        return self._mean(d_nll, self.following).cpu().numpy(), self._mean(kl, self.content).cpu().numpy()

    def _log_probs(self, model: Llama, resid: Tensor) -> Tensor:  # [batch pos d_model] -> [row d_vocab]
        return model.unembed(model.ln_final(resid[self.used])).float().log_softmax(-1)

    def _nll(self, log_probs: Tensor) -> Tensor:  # [row d_vocab] -> [row]
        return -log_probs.gather(-1, self.target[:, None])[:, 0]

    def _mean(self, values: Tensor, where: Tensor) -> Tensor:  # [row] -> [batch]; 0 for a document without content
        sums, counts = (torch.zeros(2, len(self.ids), device=values.device)).unbind()
        sums.index_add_(0, self.doc, values * where)
        counts.index_add_(0, self.doc, where.float())
        return sums / counts.clamp(min=1)

    def _mask_of(self, edit: Edit, n_experts: int) -> Tensor:  # bool [batch pos expert]: where the edit acts
        mask = torch.zeros(*self.ids.shape, n_experts, dtype=torch.bool)
        for expert, rows in zip(edit.experts, edit.at, strict=True):
            at = np.ones(len(self.rows), dtype=np.bool_) if rows is None else np.isin(self.rows, rows)
            mask[..., expert][self.real] = torch.from_numpy(at)
        return mask.to(self.ids.device)


def _hook(edit: Edit, mask: Tensor, expert_ids: Tensor) -> tuple[str, HookFn]:
    point = f"blocks.{edit.layer}.mlp.hook_" + ("routing_weights" if edit.kind == "drop" else "router_logits")

    def drop(weights: Tensor, hook: HookPoint) -> Tensor:  # [batch pos k]; the layer's input, so its ids, are unedited
        return weights.masked_fill(mask.gather(-1, expert_ids.to(mask.device)), 0)

    def reroute(logits: Tensor, hook: HookPoint) -> Tensor:  # [batch pos expert]
        return logits.masked_fill(mask, -torch.inf)

    def force(logits: Tensor, hook: HookPoint) -> Tensor:
        return torch.where(mask, logits.max(-1, keepdim=True).values + 0.01, logits)

    return point, {"drop": drop, "reroute": reroute, "force": force}[edit.kind]


def _batches(model: Llama, tokens: pl.DataFrame, batch_size: int) -> Iterator[_Batch]:
    documents = tokens.with_row_index("row").group_by("doc_id", maintain_order=True)
    parts = documents.agg("token_id", "row", pl.col("segment").is_in(CONTENT_SEGMENTS).alias("content"))
    check_room(model, parts["token_id"].to_list(), 0)
    with suitable_threads(model):
        for start in range(0, len(parts), batch_size):
            part = parts.slice(start, batch_size)
            content, rows = (np.concatenate(part[name].to_list()) for name in ("content", "row"))
            yield _Batch(model, part["token_id"].to_list(), content, rows)


def count_experts(model: Llama) -> int:
    """How many experts each routed layer has; raises ConfigError for a dense model."""
    routed_layers(model)
    return int(getattr(model.cfg, "n_experts", 0))


def _check(model: Llama, edits: Sequence[Edit]) -> None:
    layers, n_experts = routed_layers(model), count_experts(model)
    for edit in edits:
        if edit.layer not in layers:
            raise ConfigError(f"layer: expected one with experts, {', '.join(map(str, layers))}, got {edit.layer}.")
        if not all(0 <= expert < n_experts for expert in edit.experts):
            raise ConfigError(f"experts: expected ids from 0 to {n_experts - 1}, got {edit.experts}. Check the frame.")
