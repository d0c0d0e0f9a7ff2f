"""How evenly the experts are used, and whether Japanese and English text are routed differently."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import torch
from generator import stories
from generator.documents import draw_problem
from generator.parallel import LANGUAGES, join, seeded
from torch import Tensor

from workbench.hooks import HookPoint
from workbench.models import Qwen3Moe
from workbench.stats.divergence import language_divergence

EVAL_SEED = 7
N_GROUPS = 150
DEAD_SHARE = 0.1  # an expert with less than this share of its fair load counts as dead


def parallel_documents() -> Iterator[tuple[str, dict[str, str]]]:
    """(group id, the same text in both languages): stories and worked problems in turn, from the held-out side."""
    for index in range(N_GROUPS):
        rng = seeded("routing", EVAL_SEED, index)
        if index % 2:
            yield f"story-{index}", stories.story(rng)
        else:
            problem = draw_problem(rng, held_out=True)
            sentences = {
                lang: (problem.questions[lang][0], *problem.steps[lang], problem.answer[lang]) for lang in LANGUAGES
            }
            yield f"problem-{index}", {lang: join(lang, sentences[lang]) for lang in LANGUAGES}


@torch.no_grad()
def slots_per_expert(model: Qwen3Moe, text: str) -> np.ndarray:  # int64 [layer expert]
    """How often each expert was chosen while the model read a text; the BOS token is not counted."""
    counts: list[Tensor] = []

    def listen(ids: Tensor, hook: HookPoint) -> None:  # [batch pos k]
        counts.append(torch.bincount(ids[:, 1:].flatten(), minlength=model.cfg.n_experts))

    tokens = torch.tensor([model.tokenizer.to_tokens(text, bos=True)])
    names = [f"blocks.{layer}.mlp.hook_expert_ids" for layer in range(model.cfg.n_layers)]
    model.run_with_hooks(tokens, fwd_hooks=[(name, listen) for name in names])
    return torch.stack(counts).numpy()


def count_slots(model: Qwen3Moe) -> pl.DataFrame:
    """One row per parallel document, language, layer and expert, in the form that `workbench.stats` reads."""
    rows = []
    for group_id, texts in parallel_documents():
        for lang, text in texts.items():
            slots = slots_per_expert(model, text)
            n_tokens = int(slots[0].sum()) // model.cfg.k
            for layer, expert in zip(*slots.nonzero(), strict=True):
                rows.append((group_id, lang, int(layer), int(expert), int(slots[layer, expert]), n_tokens))
    return pl.DataFrame(rows, schema=["group_id", "lang", "layer", "expert", "slots", "n_tokens"], orient="row")


def load_figures(counts: pl.DataFrame, n_experts: int) -> list[dict[str, float]]:
    """Per layer: entropy of the load as a share of its maximum, smallest and largest load over the fair share."""
    figures = []
    for layer in counts["layer"].unique().sort():
        sums = counts.filter(pl.col("layer") == layer).group_by("expert").agg(pl.col("slots").sum())
        load = np.zeros(n_experts)
        load[sums["expert"].to_numpy()] = sums["slots"].to_numpy()
        load /= load.sum()
        nats = -(load[load > 0] * np.log(load[load > 0])).sum()
        figures.append(
            {
                "layer": layer,
                "entropy": float(nats / np.log(n_experts)),
                "smallest": float(load.min() * n_experts),
                "largest": float(load.max() * n_experts),
                "dead": int((load * n_experts < DEAD_SHARE).sum()),
            }
        )
    return figures


def routing_figures(model: Qwen3Moe) -> dict[str, object]:
    """Expert load per layer, and the divergence between the languages beside the floor within each (bits)."""
    counts = count_slots(model)
    return {
        "n_groups": N_GROUPS,
        "load": load_figures(counts, model.cfg.n_experts),
        "divergence": language_divergence(counts, model.cfg.n_experts).to_dicts(),
    }
