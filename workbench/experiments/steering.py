"""Steering: a vector from two sets of prompts that differ in one thing, added while the model runs on other prompts.

vector[layer] = mean over units of (mean activation of the positive version - of the negative version); a unit is one
prompt in two versions, so that content cancels (difference of means: arXiv 2308.10248, 2312.06681). At the router the
same difference of logits is a bias that re-routes (the conditional counterpart of arXiv 2509.09660).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from workbench.capture import PAD_ID, pad
from workbench.chat.parse import label_tokens
from workbench.errors import ConfigError
from workbench.experiments.contrasts import Contrast
from workbench.experiments.identity import describe_model, digest, sequences_digest
from workbench.experiments.metrics import metric_name
from workbench.experiments.result import Result
from workbench.experiments.sweeps import staged, sweep_variants
from workbench.interventions import AddVector, BiasRouter, Intervention, Where
from workbench.models import Llama

Outcome = Callable[[Llama, Sequence[Sequence[int]], Sequence[Intervention]], Sequence[float]]
POINTS = ("resid_post", "router_logits")


@dataclass(frozen=True, eq=False)
class Steering:
    """Vectors by layer, [d_model] at resid_post or [expert] at the router, and the sequences they were made from."""

    name: str
    point: str
    vectors: dict[int, Tensor]
    seen: frozenset[tuple[int, ...]]

    def interventions(
        self, layers: Sequence[int], scale: float = 1.0, where: Where | None = None
    ) -> list[Intervention]:
        """Add scale · vector in each of these layers, everywhere that `where` says (its own layers do not count)."""
        return [_intervention(self.point, layer, self._vector(layer), scale, where) for layer in layers]

    def random(self, seed: int) -> Steering:
        """A control of equal norm in each layer: a random direction, or at the router the same biases shuffled."""
        generator = torch.Generator().manual_seed(seed)
        return Steering(
            f"random {seed}", self.point,
            {layer: _shuffled(self.point, vector, generator) for layer, vector in self.vectors.items()}, self.seen,
        )  # fmt: skip

    def _vector(self, layer: int) -> Tensor:
        if layer not in self.vectors:
            raise ConfigError(f"layers: expected some of {', '.join(map(str, self.vectors))}, got {layer}.")
        return self.vectors[layer]


@torch.no_grad()
def steering_vectors(model: Llama, contrast: Contrast, point: str = "resid_post", batch_size: int = 16) -> Steering:
    """The contrast's vectors at every layer that has the point: "resid_post" or "router_logits".

    Raises ConfigError for another point, and at the router for a model without experts.
    """
    leaf = {"resid_post": "hook_resid_post", "router_logits": "mlp.hook_router_logits"}.get(point)
    names = [name for name in model.hook_dict if leaf is not None and name.split(".", 2)[-1] == leaf]
    if not names:
        raise ConfigError(f"point: expected one of {', '.join(POINTS)} that this model has, got {point!r}.")
    sums: dict[str, Tensor] = {}
    for sign, sequences, read in (
        (1, contrast.positive, contrast.read_positive),
        (-1, contrast.negative, contrast.read_negative),
    ):
        for start in range(0, len(sequences), batch_size):
            part = slice(start, start + batch_size)
            tokens, mask = pad(sequences[part], left=False)
            _, cache = model.run_with_cache(
                tokens, attention_mask=mask, names_filter=names, stop_at_layer=model.cfg.n_layers
            )
            for name in names:
                means = torch.stack(
                    [cache[name][row, places].double().mean(0) for row, places in enumerate(read[part])]
                )
                sums[name] = sums.get(name, 0) + sign * means.sum(0)
    vectors = {int(name.split(".")[1]): (total / len(contrast.positive)).float() for name, total in sums.items()}
    seen = frozenset(tuple(ids) for ids in (*contrast.positive, *contrast.negative))
    return Steering(contrast.name, point, vectors, seen)


@torch.no_grad()
def evaluate_steering(
    model: Llama,
    steering: Steering,
    prompts: Sequence[Sequence[int]],
    outcome: Outcome,
    *,
    layers: Sequence[int],
    scales: Sequence[float] = (-1.0, 0.0, 1.0),
    n_random: int = 3,
    where: Where | None = None,
    batch_size: int = 16,
    out: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """What the vector does to `outcome` on prompts it was not made from, beside random vectors of the same norm.

    Frame: vector ("steering" or "random 0" ...), scale, pair (the prompt), `value` of the outcome and `change` from the
    same prompt without steering. `result.mean("change", by=["vector", "scale"])` has the intervals over prompts.
    out: a directory that a killed call continues from; an outcome of your own is known there by its name alone.
    Raises ConfigError when a prompt, or what its user says at whatever effort, is among those that made the vector.
    """
    seen = {_asked(ids, model.tokenizer) for ids in steering.seen}
    overlap = [number for number, prompt in enumerate(prompts) if _asked(prompt, model.tokenizer) in seen]
    if overlap or not prompts:
        got = f"one of the contrast's own (number {overlap[0]})" if overlap else "none"
        raise ConfigError(
            f"prompts: expected held-out ones, got {got}. "
            "Make the vector from split='discovery' and evaluate on split='validation'."
        )
    vectors = [("steering", steering), *((f"random {seed}", steering.random(seed)) for seed in range(n_random))]
    scaled = [(name, vector, float(scale)) for name, vector in vectors for scale in scales]
    variants: list[list[Intervention]] = [[]]
    variants += [vector.interventions(layers, scale, where) for _, vector, scale in scaled if scale]
    settings = {
        "experiment": "steering", **describe_model(model), "contrast": steering.name, "point": steering.point,
        "vectors": {str(layer): digest(steering.vectors[layer]) for layer in layers}, **_describe_outcome(outcome),
        "layers": list(layers), "scales": list(map(float, scales)), "n_random": n_random,
        "where": None if where is None else where.to_json(), "n_prompts": len(prompts),
        "prompts": sequences_digest(prompts), "batch_size": batch_size,
    }  # fmt: skip

    def run(at: Callable[[str], Path | None]) -> Result:
        frame = sweep_variants(
            len(variants), len(prompts), lambda number, part: outcome(model, prompts[part], variants[number]), settings,
            batch_size=batch_size, out=at("values"), name="steering", progress=progress,
        )  # fmt: skip
        steered = count(1)
        rows = [(name, scale, next(steered) if scale else 0) for name, _, scale in scaled]
        names = pl.DataFrame(rows, schema=["vector", "scale", "variant"], orient="row")
        found = names.join(frame, on="variant", maintain_order="left_right")
        return Result(found.select("vector", "scale", pl.col("pair").cast(pl.String), "value", "change"), settings)

    return staged(run, settings, out)


@dataclass(frozen=True, eq=False)
class NamedOutcome:
    """An outcome with the name and the arguments, plain JSON values, that a result's settings show."""

    name: str
    measure: Outcome
    arguments: Mapping[str, Any]

    def __call__(
        self, model: Llama, prompts: Sequence[Sequence[int]], edits: Sequence[Intervention]
    ) -> Sequence[float]:
        return self.measure(model, prompts, edits)


def _describe_outcome(outcome: Outcome) -> dict[str, Any]:
    """`outcome`, its name, and `outcome_arguments`; those of a caller's own function are unknown (null)."""
    arguments = dict(outcome.arguments) if isinstance(outcome, NamedOutcome) else None
    return {"outcome": metric_name(outcome), "outcome_arguments": arguments}


def japanese_share(max_new_tokens: int = 24) -> Outcome:
    """Of the kana, kanji and Latin letters that the greedy continuation has in its messages, the Japanese share.

    Names of channels do not count; a continuation without letters counts 0.5.
    """

    def outcome(model: Llama, prompts: Sequence[Sequence[int]], edits: Sequence[Intervention]) -> list[float]:
        written = _continue(model, prompts, edits, max_new_tokens)
        return [_script_share(_content(model, prompt, ids)) for prompt, ids in zip(prompts, written, strict=True)]

    return NamedOutcome("japanese_share", outcome, {"max_new_tokens": max_new_tokens})


def written_length(max_new_tokens: int = 64) -> Outcome:
    """How many tokens the greedy continuation has, its end included: thinking and answer; at most `max_new_tokens`."""

    def outcome(model: Llama, prompts: Sequence[Sequence[int]], edits: Sequence[Intervention]) -> list[float]:
        return [float(len(ids)) for ids in _continue(model, prompts, edits, max_new_tokens)]

    return NamedOutcome("written_length", outcome, {"max_new_tokens": max_new_tokens})


def log_odds(token: int, other: int) -> Outcome:
    """Logit of one token minus that of another, as the next token of each prompt."""

    def outcome(model: Llama, prompts: Sequence[Sequence[int]], edits: Sequence[Intervention]) -> list[float]:
        tokens, mask = pad(prompts, left=True)
        logits = model(tokens, mask, interventions=edits)[:, -1]
        values: list[float] = (logits[:, token] - logits[:, other]).tolist()
        return values

    return NamedOutcome("log_odds", outcome, {"token": token, "other": other})


def _continue(
    model: Llama, prompts: Sequence[Sequence[int]], edits: Sequence[Intervention], max_new_tokens: int
) -> list[list[int]]:
    tokens, mask = pad(prompts, left=True)
    result: Any = model.generate(tokens, mask, max_new_tokens=max_new_tokens, pad_id=PAD_ID, interventions=edits)
    found: list[list[int]] = result.continuations()
    return found


def _content(model: Llama, prompt: Sequence[int], written: Sequence[int]) -> str:
    """The text of what was written, without headers and special tokens."""
    labels = label_tokens([*prompt, *written], model.tokenizer)[len(prompt) :]
    kept = [token for token, label in zip(written, labels, strict=True) if label not in ("control", "bos")]
    return str(model.tokenizer.to_string(kept, skip_special=True))


def _asked(ids: Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """What the user says, since another effort or channel makes no other prompt; all of it where nobody does."""
    labels = label_tokens(ids, tokenizer) if tokenizer is not None else []
    said = tuple(token for token, label in zip(ids, labels, strict=False) if label == "user")
    return said or tuple(ids)


def _intervention(point: str, layer: int, vector: Tensor, scale: float, where: Where | None) -> Intervention:
    limits = {**(where.to_json() if where else {}), "layers": (layer,)}
    if point == "router_logits":
        return BiasRouter(bias=vector, scale=scale, where=Where(**limits))
    return AddVector(point=point, vector=vector, scale=scale, where=Where(**limits))


def _shuffled(point: str, vector: Tensor, generator: torch.Generator) -> Tensor:
    if point == "router_logits":
        return vector[torch.randperm(len(vector), generator=generator).to(vector.device)]
    drawn = torch.randn(vector.shape, generator=generator).to(vector)
    return drawn * vector.norm() / drawn.norm()


def _script_share(text: str) -> float:
    japanese = sum("\u3040" <= char <= "\u30ff" or "\u4e00" <= char <= "\u9fff" for char in text)
    latin = sum(char.isascii() and char.isalpha() for char in text)
    return japanese / (japanese + latin) if japanese + latin else 0.5
