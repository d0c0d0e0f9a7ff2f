"""One calibration trial: a planted checkpoint, fresh documents, the default pipeline, its answers beside the truth.

The pipeline is the one that a study runs: counts and centred logits per group, a paired contrast with max-T over every
layer and expert. Nothing here knows which experts were planted until the answers are joined to the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import polars as pl

from workbench.axes import LANGUAGES
from workbench.capture import capture_routing, suitable_threads
from workbench.errors import ConfigError
from workbench.models import Qwen3Moe
from workbench.planted.design import Design
from workbench.planted.documents import (
    MODES,
    effort_documents,
    language_documents,
    mode_documents,
    null_documents,
    sequences,
)
from workbench.planted.experts import plant
from workbench.stats.contrasts import paired_contrasts
from workbench.stats.load import slot_counts
from workbench.stats.logits import logit_cells
from workbench.stats.matching import match_tokens


@dataclass(frozen=True)
class Contrast:
    """A comparison: its documents, the two conditions, whether tokens are matched, and the planted answer."""

    documents: Callable[..., pl.DataFrame]
    axis: str
    values: tuple[str, str]
    shared_tokens: bool
    truth: tuple[str, ...]  # contrasts of `Design.truth` that count as right


def _confounded(n_groups: int, n_words: int, seed: int) -> pl.DataFrame:
    return language_documents(n_groups, n_words, seed, topics_differ=True)


CONTRASTS: dict[str, Contrast] = {
    # "shared" compares the tokens that both languages have: the primary contrast, and blind to vocabulary
    "shared": Contrast(language_documents, "lang", LANGUAGES, True, ("language_context",)),
    "all": Contrast(language_documents, "lang", LANGUAGES, False, ("language_context", "language_token")),
    "mode": Contrast(mode_documents, "segment", MODES, False, ("mode",)),
    "effort": Contrast(effort_documents, "effort", ("high", "low"), False, ("effort",)),
    # topics differ between the languages throughout; an answer that names a topic expert is wrong
    "confounded": Contrast(_confounded, "lang", LANGUAGES, True, ("language_context",)),
    # one language, labelled twice: every effect is 0
    "null": Contrast(null_documents, "lang", LANGUAGES, False, ()),
}


@dataclass(frozen=True)
class Trial:
    """What is tried: a contrast on documents of a planted checkpoint. `draw` is the seed of the documents."""

    contrast: str
    design: Design
    n_groups: int = 40
    n_words: int = 64
    draw: int = 0
    n_resamples: int = 1000

    def __post_init__(self) -> None:
        if self.contrast not in CONTRASTS:
            raise ConfigError(
                f"contrast: expected one of {', '.join(CONTRASTS)}, got {self.contrast!r}. Pass one of them."
            )

    @property
    def name(self) -> str:
        """Unique among trials; names its file."""
        d = self.design
        shape = f"{d.n_experts}x{d.k}x{d.n_layers}-{d.kind}-s{d.strength:g}-m{d.seed}"
        return f"{self.contrast}-{shape}-g{self.n_groups}-w{self.n_words}-d{self.draw:04}"


def run_trial(trial: Trial) -> pl.DataFrame:
    """Answers and truth: one row per (layer, expert).

    Columns: contrast, kind, strength, model (its seed), n_groups, draw, layer, expert, role, truth (bool), sign, uses
    (compared tokens of a group that chose the expert, on average), and what the pipeline said: MEASURED.
    """
    contrast, design = CONTRASTS[trial.contrast], trial.design
    model = _planted(design)
    tokens = contrast.documents(trial.n_groups, trial.n_words, trial.draw)
    with suitable_threads(model):
        routing = capture_routing(model, sequences(tokens), router_logits=True)
    frame = routing.frame(tokens["doc_id"].to_list(), tokens["pos"].to_list())
    assert routing.router_logits is not None
    shard = (tokens.select("doc_id", "pos"), routing.layers, routing.router_logits)
    if contrast.shared_tokens:
        tokens = match_tokens(tokens, contrast.axis, contrast.values)
    by = ["group_id", contrast.axis]
    counts, cells = slot_counts(tokens, frame, by), logit_cells([shard], tokens, by)
    answers = paired_contrasts(
        counts, contrast.axis, contrast.values, design.n_experts, cells, trial.n_resamples, trial.draw
    )
    truth = design.truth().with_columns(truth=pl.col("contrast").is_in(contrast.truth)).drop("contrast")
    labels = {
        "contrast": trial.contrast, "kind": design.kind, "strength": float(design.strength), "model": design.seed,
        "n_groups": trial.n_groups, "draw": trial.draw,
    }  # fmt: skip
    return (
        truth.join(answers, on=["layer", "expert"], how="left", maintain_order="left")
        .with_columns(
            **{name: pl.lit(value) for name, value in labels.items()},
            uses=pl.mean_horizontal(f"f_{value}" for value in contrast.values)
            * pl.col("n_tokens")
            / pl.col("n_groups"),
        )
        .select(*labels, "layer", "expert", "role", "truth", "sign", "uses", *MEASURED)
    )


MEASURED = (
    "risk_difference", "low", "high", "p_adjusted", "logit_difference", "logit_d", "logit_low", "logit_high",
    "logit_p_adjusted",
)  # fmt: skip


@lru_cache(maxsize=8)
def _planted(design: Design) -> Qwen3Moe:
    return plant(design)
