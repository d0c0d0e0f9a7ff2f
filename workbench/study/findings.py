"""What the numbers say, in sentences: every number in them is computed."""

from __future__ import annotations

from collections.abc import Collection

import polars as pl

from workbench.axes import EFFORTS
from workbench.plots.experts import AXES
from workbench.plots.theme import NAMES, ordered
from workbench.stats.validation import equivalent_experts
from workbench.study.measures import clear_preferences
from workbench.study.wording import counted, known

ALPHA = 0.05
FEW_GROUPS = 20
ALIKE = 0.05  # of the tokens: a smaller difference is none for most purposes
CORRECTED = "after correction over all of them"


def findings(tokens: pl.DataFrame, frames: dict[str, pl.DataFrame], stop_ids: Collection[int]) -> list[str]:
    """The page's opening lines, from the frames of `study.report.summarise`; `stop_ids` end an answer."""
    lines = [*_few_groups(frames), *_divergence(frames), *_shared(frames), *_audit(frames), *_contrasts(frames)]
    lines += [*_preferences(clear_preferences(frames["preferences"])), *_lengths(frames)]
    lines.append(_balance(frames["balance"]))
    unfinished = _unfinished(tokens, stop_ids)
    return [*lines, unfinished] if unfinished else lines


def _divergence(frames: dict[str, pl.DataFrame]) -> list[str]:
    if "divergence" not in frames:
        return ["No prompt group is in both Japanese and English, so the languages are not compared."]
    frame = frames["divergence"]
    if frame["excess"].is_nan().any():
        return [f"With {counted(frame['n_groups'][0], 'group')} in both languages, no divergence can be estimated."]
    above = frame.filter(pl.col("excess_low") > 0)
    verdict = (
        f"Japanese and English take different routes in {len(above)} of {counted(len(frame), 'layer')}, judged layer "
        "by layer by the 95% interval of the excess over the within-language floor."
    )
    if above.is_empty():
        return [verdict]
    top = above.sort("excess", descending=True).row(0, named=True)
    return [
        f"{verdict} Of these the excess is largest in layer {top['layer']}: {top['between']:.3f} bits between "
        f"languages against a floor of {top['floor']:.4f} (excess {top['excess']:.3f}, 95% interval "
        f"{top['excess_low']:.3f} to {top['excess_high']:.3f})."
    ]


def _contrasts(frames: dict[str, pl.DataFrame]) -> list[str]:
    if "contrasts" not in frames or frames["contrasts"]["p_adjusted"].is_nan().all():
        return []
    frame = frames["contrasts"]
    certain = frame.filter(pl.col("p_adjusted") < ALPHA)
    n_groups = frame["n_groups"][0]
    if 2.0 ** (1 - n_groups) >= ALPHA:
        return [f"With {counted(n_groups, 'group')} in both languages, no expert could be told apart at p < {ALPHA}."]
    if certain.is_empty():
        return [f"None of {counted(len(frame), 'expert')} is used significantly differently (p < {ALPHA} {CORRECTED})."]
    large = certain.filter(pl.col("risk_difference").abs() >= 0.1)
    top = certain.row(0, named=True)
    side = NAMES["ja" if top["risk_difference"] > 0 else "en"]
    return [
        f"{len(certain)} of {counted(len(frame), 'expert')} {'is' if len(certain) == 1 else 'are'} used differently "
        f"(p < {ALPHA} {CORRECTED}), {len(large)} of these by at least 10 points. The largest of these differences is "
        f"layer {top['layer']}, expert {top['expert']}, used more in {side}: on average over prompt groups by "
        f"{top['f_ja']:.1%} of a group's Japanese and {top['f_en']:.1%} of its English tokens."
    ]


def _few_groups(frames: dict[str, pl.DataFrame]) -> list[str]:
    counts = frames["contrasts"]["n_groups"] if "contrasts" in frames else frames["balance"]["n_units"]
    n_groups = int(counts.to_numpy().max())
    if n_groups >= FEW_GROUPS:
        return []
    verb = "This is" if n_groups == 1 else "These are"
    return [f"{verb} {counted(n_groups, 'prompt group')}: below {FEW_GROUPS}, any interval is too narrow to rely on."]


def _shared(frames: dict[str, pl.DataFrame]) -> list[str]:
    """The primary answer: the same words in both languages."""
    if "shared" not in frames or "calibrated" not in frames:
        return []
    frame, matched = frames["shared"], frames["matching"]
    flagged, kept = frame.filter("flagged"), " and ".join(f"{share:.0%}" for share in matched["share"])
    risk, logit = frames["calibrated"].row(0)
    lines = [
        f"On the words that both languages of a group share ({kept} of the tokens), {len(flagged)} of "
        f"{counted(len(frame), 'expert')} differ between the languages beyond the floors calibrated on planted models "
        f"of this shape (|difference| {risk:g}, |logit| {logit:g} sd)."
    ]
    if len(flagged):
        top = flagged.row(0, named=True)
        lines.append(
            f"The largest of these is layer {top['layer']}, expert {top['expert']}, used more in "
            f"{NAMES['ja' if top['side'] > 0 else 'en']}: {abs(top['risk_difference']):.3f} of the shared words "
            f"(95% interval of JA - EN {top['low']:+.3f} to {top['high']:+.3f})."
        )
    n_groups = int(frame["n_groups"][0])
    if 2.0 ** (1 - n_groups) >= ALPHA:
        lines.append(
            f"With {counted(n_groups, 'group')} that share words no expert could be told apart at p < {ALPHA}."
        )
    if n_groups < FEW_GROUPS:
        return lines
    used = frame.filter(pl.col("f_ja") + pl.col("f_en") > 0)
    alike = equivalent_experts(used, ALIKE)["shared"].sum()
    lines.append(
        f"{alike} of {counted(len(frame), 'expert')} are used alike on these words to within {ALIKE:.0%} of them: "
        "their whole interval lies there, which is more than a difference not found."
    )
    return lines


def _audit(frames: dict[str, pl.DataFrame]) -> list[str]:
    if "audit" not in frames or frames["audit"].is_empty():
        return []
    removed = frames["audit"].filter(kind="reroute")
    matter, one_by_one = (removed.filter(pl.col(name) <= ALPHA) for name in ("p_kl_adjusted", "p_kl"))
    n, least = int(removed["n_controls"].to_numpy().max()), float(removed["least_p"].to_numpy().min())
    limit = f", of which {n} controls allow none below p = {least:.2f}" if least > ALPHA else ""
    return [
        f"Of {counted(len(removed), 'expert')} flagged on shared words or on all, {len(one_by_one)} matter more when "
        f"removed than up to {n} other experts of their layer do, each on as many tokens (judged one by one, p <= "
        f"{ALPHA}: {ALPHA * len(removed):.1f} would by chance); {len(matter)} {CORRECTED}{limit}."
    ]


def _lengths(frames: dict[str, pl.DataFrame]) -> list[str]:
    if "lengths" not in frames:
        return []
    frame = frames["lengths"].filter(pl.col("segment") == "analysis")
    lines = []
    for lang in ordered(frame["lang"]):
        means = dict(frame.filter(pl.col("lang") == lang).select("effort", "mean").rows())
        shown = ", ".join(f"{means[effort]:.0f} ({effort})" for effort in EFFORTS if effort in means)
        lines.append(f"{NAMES.get(lang, lang)} analysis tokens per answer, on average over prompt groups: {shown}.")
    return lines


def _balance(balance: pl.DataFrame) -> str:
    worst = balance.filter(measure="effective_experts").sort("value").row(0, named=True)
    interval = f" (95% interval {worst['low']:.1f} to {worst['high']:.1f})" if known(worst["low"]) else ""
    n_idle = int(balance.filter(measure="n_idle")["value"].sum())
    idle = (
        f"In {counted(n_idle, 'case')} an expert got no content token of a language."
        if n_idle
        else "No expert is idle."
    )
    return (
        f"The least even layer is {worst['layer']} in {NAMES.get(worst['lang'], worst['lang'])}, with "
        f"{worst['value']:.1f} effective experts{interval}. {idle}"
    )


def _preferences(preferences: pl.DataFrame) -> list[str]:
    if preferences.is_empty():
        return []
    counts = preferences.group_by("axis").agg(n=pl.struct("layer", "expert").n_unique())
    counts = counts.sort("n", "axis", descending=[True, False])
    shown = ", ".join(f"{AXES[axis]} {n}" for axis, n in counts.rows())
    return [
        "Experts that take at least ten more or fewer of every hundred tokens of some kind, significantly after "
        f"correction within that kind: by {shown}. Most of that may be the words themselves."
    ]


def _unfinished(tokens: pl.DataFrame, stop_ids: Collection[int]) -> str:
    """How many answers were cut off by the token limit: those that do not end in a token that ends generation."""
    last = tokens.filter(pl.col("phase") == "decode").group_by("doc_id").agg(pl.col("token_id").sort_by("pos").last())
    cut = last.filter(~pl.col("token_id").is_in(list(stop_ids))).height
    return f"The token limit cut off {cut:,} of {counted(len(last), 'answer')}." if cut else ""
