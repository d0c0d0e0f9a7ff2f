"""The causal audit: which of the experts that a statistic flagged matter when they are removed or forced?

Routing statistics say where tokens go. An expert that Japanese uses twice as often may still do nothing that its
neighbours would not do; arXiv 2606.10703 found no observational score that predicts causal effect. So every flagged
expert is compared with random controls of its own layer that take as many token-slots as it does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from workbench.axes import LANGUAGES
from workbench.errors import ConfigError
from workbench.experiments.knockout import Edit, Outcome, routing_of, run_edits
from workbench.models import Llama
from workbench.stats.audits import adjust_audit
from workbench.stats.resampling import jackknife_interval, t_interval

Place = tuple[int, int]  # (layer, expert)
MIN_CONTROLS = 20
MOST_SCALED = 4  # a control with fewer slots has its effect scaled up to the flagged expert's, at most so far by choice


@dataclass(frozen=True)
class AuditPlan:
    """kinds: of edits, see `knockout.Edit`. n_controls: other experts per expert and kind, fewer where the layer has
    fewer; the empirical p cannot be smaller than 1 / (n_controls + 1). seed: of the draws."""

    kinds: tuple[str, ...] = ("drop", "reroute", "force")
    n_controls: int = MIN_CONTROLS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_controls < MIN_CONTROLS:
            raise ConfigError(
                f"n_controls: expected at least {MIN_CONTROLS}, got {self.n_controls}. Fewer give no p below 0.05."
            )


def audit_experts(
    model: Llama,
    tokens: pl.DataFrame,
    flagged: Sequence[Place],
    plan: AuditPlan | None = None,
    exclude: Collection[Place] = (),
    batch_size: int = 16,
    progress: bool = False,
) -> pl.DataFrame:
    """Remove and force each flagged (layer, expert): one row per expert and kind, as `AUDIT_SCHEMA` lists.

    tokens: the documents, axes.TOKEN_COLUMNS. Controls are other experts of the same layer, each drawn once, neither
    flagged nor in `exclude` (super experts belong there); see `draw_controls`. Removed from fewer token-slots than the
    flagged one has, a control's effect counts in proportion: effects are compared per slot, on the flagged one's scale
    (control_kl, control_kl_max; control_load is what was removed). kl and
    d_nll_* are means over prompt groups, nats per content token, with 95% intervals over groups (`t_interval`).
    selectivity = (d_nll_ja - d_nll_en) / (|d_nll_ja| + |d_nll_en|), from -1 (English alone) to 1 (Japanese alone), with
    a jackknife interval over the groups in both languages, or all of [-1, 1] where neither effect is certain. p_kl,
    p_selective: share of controls with at least as large a KL, or as large a difference between the languages; the
    flagged expert counts as one of them. p_kl_adjusted, p_selective_adjusted: the same, corrected over the n_tests
    experts of a kind, and least_p, below which no corrected p can be (`stats.audits.adjust_audit`). p_selective is null
    where a language is missing.
    Raises ConfigError for layers or experts that do not exist.
    """
    plan = plan or AuditPlan()
    chosen = routing_of(model, tokens, batch_size)  # [token layer expert]
    rng = np.random.default_rng(plan.seed)
    banned = {*flagged, *exclude}
    edits, removed, sizes = [], [], []
    for kind in plan.kinds:
        for layer, expert in flagged:
            edits.append(Edit(kind, layer, (expert,)))
            removed.append(int(chosen[:, layer, expert].sum()))
            controls = draw_controls(kind, layer, expert, chosen[:, layer], banned, plan.n_controls, rng)
            edits += [control for control, _ in controls]
            removed += [n_slots for _, n_slots in controls]
            sizes.append(1 + len(controls))
    outcome = run_edits(model, tokens, edits, batch_size, progress)
    return _summarise(outcome, edits, removed, sizes, len(tokens))


def removal_effects(
    model: Llama, tokens: pl.DataFrame, places: Sequence[Place], kind: str = "reroute", batch_size: int = 16,
    progress: bool = False,
) -> pl.DataFrame:  # fmt: skip
    """What an edit of each (layer, expert) does, without controls: the columns of the audit up to `selectivity_high`.

    A description for maps and cards; only `audit_experts` says whether an effect is more than any expert's.
    """
    edits = [Edit(kind, layer, (expert,)) for layer, expert in places]
    outcome = run_edits(model, tokens, edits, batch_size, progress)
    groups = _by_group(outcome)
    rows = [_effect_row(groups, place, edit) for place, edit in enumerate(edits)]
    return pl.DataFrame(rows, schema=EFFECT_SCHEMA)


def pair_effects(
    model: Llama, tokens: pl.DataFrame, layer: int, pairs: Sequence[tuple[int, int]], kind: str = "reroute",
    batch_size: int = 16,
) -> pl.DataFrame:  # fmt: skip
    """Remove pairs of one layer's experts together and apart: redundancy shows as more effect together.

    Columns: layer, expert_a, expert_b, kl_a, kl_b, kl_both, excess = kl_both - kl_a - kl_b with its 95%
    interval over groups (excess_low, excess_high), nats per content token; largest excess first. A single removal of
    an expert whose work another can do shows next to nothing (self-repair): excess finds it.
    """
    singles = sorted({expert for pair in pairs for expert in pair})
    edits = [Edit(kind, layer, (expert,)) for expert in singles] + [Edit(kind, layer, pair) for pair in pairs]
    kl = _by_group(run_edits(model, tokens, edits, batch_size)).kl  # [edit group]
    rows = []
    for place, (a, b) in enumerate(pairs):
        alone = kl[singles.index(a)], kl[singles.index(b)]
        both = kl[len(singles) + place]
        excess = both - alone[0] - alone[1]
        low, high = t_interval(excess)
        means = [float(np.mean(values)) for values in (*alone, both, excess)]
        rows.append((layer, a, b, *means, float(low), float(high)))
    names = ["layer", "expert_a", "expert_b", "kl_a", "kl_b", "kl_both", "excess", "excess_low", "excess_high"]
    return pl.DataFrame(rows, schema=names, orient="row").sort("excess", descending=True)


def draw_controls(
    kind: str, layer: int, expert: int, chosen: np.ndarray, banned: Collection[Place], n: int, rng: np.random.Generator
) -> list[tuple[Edit, int]]:
    """Up to n other experts of the layer, each once, with the token-slots each loses; chosen is bool [token expert].

    Removal: experts that take at least a quarter of the flagged one's slots, in random order, and the busiest of the
    others where there are too few; one with more slots than the flagged loses only as many, at random tokens. Forcing
    acts on every token, whatever the load. An expert is drawn once: drawn again it would say nothing new.
    """
    others = np.array([e for e in range(chosen.shape[1]) if e != expert and (layer, e) not in banned], dtype=np.int64)
    if not len(others):
        raise ConfigError(f"controls: expected unflagged experts in layer {layer}, got none. Flag fewer experts.")
    loads, target = chosen.sum(0), int(chosen[:, expert].sum())
    others = rng.permutation(others)
    if kind == "force":
        return [(Edit(kind, layer, (int(other),)), int(loads[other])) for other in others[:n]]
    near = loads[others] >= target / MOST_SCALED
    ranked = [*others[near], *sorted(others[~near], key=lambda other: -loads[other])]
    controls = []
    for other in ranked[:n]:
        rows = np.flatnonzero(chosen[:, other])
        if len(rows) > target:
            rows = rng.choice(rows, target, replace=False)
        controls.append((Edit(kind, layer, (int(other),), (rows,)), len(rows)))
    return controls


EFFECT_SCHEMA = {
    "layer": pl.Int64, "expert": pl.Int64, "kind": pl.String, "kl": pl.Float64, "kl_low": pl.Float64,
    "kl_high": pl.Float64, "d_nll_ja": pl.Float64, "d_nll_ja_low": pl.Float64, "d_nll_ja_high": pl.Float64,
    "d_nll_en": pl.Float64, "d_nll_en_low": pl.Float64, "d_nll_en_high": pl.Float64, "selectivity": pl.Float64,
    "selectivity_low": pl.Float64, "selectivity_high": pl.Float64,
}  # fmt: skip
AUDIT_SCHEMA = EFFECT_SCHEMA | {
    "load": pl.Float64, "control_load": pl.Float64, "control_kl": pl.Float64, "control_kl_max": pl.Float64,
    "p_kl": pl.Float64, "p_kl_adjusted": pl.Float64, "p_selective": pl.Float64, "p_selective_adjusted": pl.Float64,
    "n_controls": pl.Int64, "n_tests": pl.Int64, "least_p": pl.Float64, "n_groups": pl.Int64, "n_docs": pl.Int64,
}  # fmt: skip

ADJUSTED = ("p_kl_adjusted", "p_selective_adjusted", "n_tests", "least_p")
MEASURED = {name: dtype for name, dtype in AUDIT_SCHEMA.items() if name not in ADJUSTED}


@dataclass(frozen=True)
class _Groups:
    """Effects with the prompt group as the unit: kl [edit group]; d_nll by language [edit group], NaN where absent."""

    kl: np.ndarray
    d_nll: dict[str, np.ndarray]


def _by_group(outcome: Outcome) -> _Groups:
    names = outcome.docs["group_id"].unique(maintain_order=True).to_list()
    groups, langs = outcome.docs["group_id"].to_list(), outcome.docs["lang"].to_list()

    def mean(values: np.ndarray, lang: str | None) -> np.ndarray:
        parts = [
            [place for place in range(len(groups)) if groups[place] == name and lang in (None, langs[place])]
            for name in names
        ]
        empty = np.full(len(values), np.nan)
        return np.stack([values[:, part].mean(1) if part else empty for part in parts], axis=1)

    return _Groups(mean(outcome.kl, None), {lang: mean(outcome.d_nll, lang) for lang in LANGUAGES})


def _effect_row(groups: _Groups, place: int, edit: Edit) -> dict[str, object]:
    row: dict[str, object] = {"layer": edit.layer, "expert": edit.experts[0], "kind": edit.kind}
    row |= _interval("kl", groups.kl[place])
    by_lang = {lang: groups.d_nll[lang][place] for lang in LANGUAGES}
    for lang, values in by_lang.items():
        row |= _interval(f"d_nll_{lang}", values)
    return row | _selectivity(by_lang["ja"], by_lang["en"])


def _interval(name: str, values: np.ndarray) -> dict[str, float]:
    values = values[np.isfinite(values)]
    low, high = t_interval(values)
    mean = float(values.mean()) if len(values) else np.nan
    return {name: mean, f"{name}_low": float(low), f"{name}_high": float(high)}


def _selectivity(ja: np.ndarray, en: np.ndarray) -> dict[str, float]:
    """The index over groups that are in both languages, and its interval.

    A jackknife does not see where the index jumps or is flat: where both languages' intervals hold 0 (near 0 / 0)
    nothing is ruled out, and where the effects differ in sign (the index is 1 or -1, whatever their size) the interval
    reaches as far as either language's own.
    """
    paired = np.isfinite(ja) & np.isfinite(en)
    ja, en = ja[paired], en[paired]
    if len(ja) < 2:
        return dict.fromkeys(("selectivity", "selectivity_low", "selectivity_high"), np.nan)

    def index(out: int | None) -> np.ndarray:
        kept = np.arange(len(ja)) != (-1 if out is None else out)
        return _index(ja[kept].mean(), en[kept].mean())

    estimate, low, high = jackknife_interval(index, len(ja))
    of_ja, of_en = t_interval(ja), t_interval(en)
    if all(ends[0] <= 0 <= ends[1] for ends in (of_ja, of_en)):
        low, high = np.array(-1.0), np.array(1.0)
    elif ja.mean() * en.mean() <= 0:
        reached = [_index(end, en.mean()) for end in of_ja] + [_index(ja.mean(), end) for end in of_en]
        low, high = np.min(reached), np.max(reached)
    return {
        "selectivity": float(estimate),
        "selectivity_low": max(float(low), -1.0),
        "selectivity_high": min(float(high), 1.0),
    }


def _index(ja: np.ndarray, en: np.ndarray) -> np.ndarray:
    size = np.abs(ja) + np.abs(en)
    return np.divide(ja - en, size, out=np.zeros_like(np.asarray(size, dtype=float)), where=size > 0)


def _summarise(
    outcome: Outcome, edits: Sequence[Edit], removed: Sequence[int], sizes: Sequence[int], n_tokens: int
) -> pl.DataFrame:
    """One row per block of `sizes` edits, the flagged expert's first and its controls'."""
    groups = _by_group(outcome)
    kl = groups.kl.mean(1)  # [edit]
    contrast = np.abs(_finite_mean(groups.d_nll["ja"]) - _finite_mean(groups.d_nll["en"]))
    rows, first = [], 0
    for size in sizes:
        block = slice(first, first + size)
        scale = _scale(edits[first].kind, np.array(removed[block]))
        effects, contrasts = kl[block] * scale, contrast[block] * scale
        row = _effect_row(groups, first, edits[first])
        row |= {
            "load": removed[first] / n_tokens,
            "control_load": float(np.mean(removed[block][1:])) / n_tokens,
            "control_kl": float(effects[1:].mean()),
            "control_kl_max": float(effects[1:].max()),
            "p_kl": float((effects >= effects[0]).mean()),
            "p_selective": None if np.isnan(contrasts[0]) else float((contrasts >= contrasts[0]).mean()),
            "n_controls": size - 1,
            "n_groups": groups.kl.shape[1],
            "n_docs": len(outcome.docs),
        }
        rows.append(row)
        first += size
    return adjust_audit(pl.DataFrame(rows, schema=MEASURED)).select(list(AUDIT_SCHEMA))


def _scale(kind: str, removed: np.ndarray) -> np.ndarray:  # [draw] slots, the flagged expert's first -> factor [draw]
    if kind == "force":
        return np.ones(len(removed))
    return np.divide(removed[0], removed, out=np.zeros(len(removed)), where=removed > 0)


def _finite_mean(values: np.ndarray) -> np.ndarray:  # [edit group] -> [edit], over the groups that have the language
    present = np.isfinite(values).all(0)
    return values[:, present].mean(1) if present.any() else np.full(len(values), np.nan)
