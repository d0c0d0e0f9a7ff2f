"""Japanese against English: the shared-token contrast first, all tokens second, floors from calibration."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from workbench.axes import LANGUAGES
from workbench.errors import ConfigError
from workbench.io.runs import Run
from workbench.stats.calibration import effect_floors
from workbench.stats.contrasts import flag_experts, paired_contrasts
from workbench.stats.load import CONTENT_SEGMENTS, slot_counts
from workbench.stats.logits import logit_cells
from workbench.stats.matching import match_tokens, matching_summary


def compares_languages(tokens: pl.DataFrame) -> bool:
    """Whether any prompt group has counted tokens in both languages: every comparison of the two is within groups."""
    counted = tokens.filter(pl.col("segment").is_in(CONTENT_SEGMENTS), pl.col("lang").is_in(LANGUAGES))
    return bool((counted.group_by("group_id").agg(pl.col("lang").n_unique())["lang"] == len(LANGUAGES)).any())


def floors_of(run: Run) -> tuple[float, float] | None:
    """The calibrated effect floors for this model's shape; None where nobody calibrated it.

    None for a run without router logits too: floors are calibrated as a pair, and where the share's is 0 the logit's
    does all the work.
    """
    if not has_logits(run):
        return None
    try:
        return effect_floors(run.n_experts, run.manifest["model"]["k"])
    except ConfigError:
        return None


def language_frames(run: Run, tokens: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """shared (shared words), contrasts (all tokens), both with `flagged` and `side`, matching (what was kept) and
    shared_words (which words weigh most)."""
    matched = shared_words(tokens)
    frames = {"contrasts": contrast(run, tokens, "lang", LANGUAGES)}
    if not matched.is_empty():
        frames["shared"] = contrast(run, matched, "lang", LANGUAGES)
        frames["matching"] = matching_summary(tokens, matched, "lang")
        frames["shared_words"] = heaviest_words(matched)
        floors = floors_of(run)
        if floors is not None:
            frames["calibrated"] = pl.DataFrame({"risk_floor": [floors[0]], "logit_floor": [floors[1]]})
    return frames


def shared_words(tokens: pl.DataFrame) -> pl.DataFrame:
    """The words that both languages of a group have, weighted by `match_tokens`; blanks are no words.

    A space is the same token in both languages and not the same thing: where one of them writes spaces between words
    and the other does not, it would outweigh all words together.
    """
    return match_tokens(tokens.filter(pl.col("token").str.strip_chars() != ""), "lang", LANGUAGES)


def heaviest_words(matched: pl.DataFrame, n: int = 20) -> pl.DataFrame:
    """token, share (of the weight of the comparison), n_groups: the words that it rests on most."""
    total = matched["weight"].sum()
    words = matched.group_by("token").agg(share=pl.col("weight").sum() / total, n_groups=pl.col("group_id").n_unique())
    return words.sort("share", "token", descending=[True, False]).head(n)


def contrast(run: Run, tokens: pl.DataFrame, axis: str, values: tuple[str, str]) -> pl.DataFrame:
    """A paired contrast of a run's tokens, with centred logits where the run has them, flagged by the floors.

    Without calibrated floors, or without the logits they need, nothing is flagged: significance alone is no claim
    (docs/calibration.md).
    """
    by = ["group_id", axis]
    cells = logit_cells(run.router_logits(), tokens, by) if has_logits(run) else None
    counts = slot_counts(tokens, run.routing, by)
    found = paired_contrasts(counts, axis, values, run.n_experts, cells, seed=run.seed)
    floors = floors_of(run)
    if floors is None:
        return found.with_columns(flagged=pl.lit(False), side=pl.lit(0, dtype=pl.Int64))
    return flag_experts(found, *floors)


def has_logits(run: Run) -> bool:
    return bool(run.manifest["settings"]["router_logits"])


def flagged_places(run: Run, tokens: pl.DataFrame) -> list[tuple[int, int]]:
    """(layer, expert) of `to_audit`; none where no group has both languages."""
    if not compares_languages(tokens):
        return []
    frames = language_frames(run, tokens)
    return to_audit(frames)


def to_audit(frames: Mapping[str, pl.DataFrame]) -> list[tuple[int, int]]:
    """(layer, expert) flagged on shared words, then on all tokens, each with the largest difference first."""
    largest = pl.col("risk_difference").abs()
    parts = [frames[name].filter("flagged") for name in ("shared", "contrasts") if name in frames]
    ordered = [part.sort(largest, descending=True, maintain_order=True).select("layer", "expert") for part in parts]
    return [(int(layer), int(expert)) for layer, expert in pl.concat(ordered).unique(maintain_order=True).rows()]


def flagged_experts(frames: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """The rows of the contrast of shared words, or of all words where none are shared, that are flagged; none of a run
    that does not compare languages."""
    frame = frames.get("shared", frames.get("contrasts"))
    return pl.DataFrame(schema={"layer": pl.Int64, "expert": pl.Int64}) if frame is None else frame.filter("flagged")


def language_facts(run: Run, frames: dict[str, pl.DataFrame]) -> dict[str, str]:
    """Sentences of the page about the shared words: facts.floors and facts.matching."""
    floors, model = floors_of(run), run.manifest["model"]
    if not has_logits(run):
        text = "(none: floors are calibrated for share and router logit together, and this run has no router logits)"
    elif floors is None:
        text = (
            f"(none: no floors are calibrated for {model['n_experts']} experts with k={model['k']}, so nothing is "
            "marked; workbench calibrate finds them)"
        )
    else:
        logit = f" and {floors[1]:g} standard deviations of the router logit"
        shape = f"{model['n_experts']} experts, k={model['k']}"
        text = f"of {floors[0]:g} in share{logit}, calibrated on planted models of {shape}"
    if "matching" not in frames:
        return {"floors": text, "matching": ""}
    kept = " ".join(
        f"{row['lang']}: {row['n_kept']:,} of {row['n_tokens']:,} tokens ({row['share']:.1%}), "
        f"{row['n_units_kept']} of {row['n_units']} groups."
        for row in frames["matching"].iter_rows(named=True)
    )
    words = ", ".join(f"{row['token']!r} {row['share']:.0%}" for row in frames["shared_words"].head(5).to_dicts())
    return {"floors": text, "matching": f"{kept} The words that weigh most in it: {words}."}
