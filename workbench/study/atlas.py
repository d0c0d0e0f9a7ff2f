"""The atlas: one card for each expert, from what was measured about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from workbench.io.runs import Run
from workbench.plots.experts import AXES
from workbench.plots.report import Card, Fact
from workbench.plots.theme import NAMES
from workbench.stats.coactivation import expert_graph
from workbench.stats.load import CONTENT_SEGMENTS, slot_counts
from workbench.stats.specialisation import top_tokens
from workbench.study.languages import flagged_experts
from workbench.study.measures import clear_preferences
from workbench.study.remarks import LIFT
from workbench.study.wording import estimate, known

MAX_CARDS = 512  # of a larger model only the flagged and the most used experts get one
N_CONTEXTS = 3
WIDTH = 6  # tokens shown on each side of an example


def atlas_frames(run: Run, tokens: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """words (what each expert takes beyond its load), use (by segment), contexts (tokens in context)."""
    by_segment = slot_counts(tokens, run.routing, ["segment"]).select(
        "segment", "layer", "expert", f=pl.col("slots") / pl.col("n_tokens")
    )
    return {
        "words": top_tokens(tokens, run.routing, run.n_experts, n=8),
        "use": by_segment,
        "contexts": contexts(run, tokens),
    }


def contexts(run: Run, tokens: pl.DataFrame) -> pl.DataFrame:
    """For each expert the tokens that it weighed most, in context and from different texts.

    Columns layer, expert, lang, before, token, after, weight. The N_CONTEXTS largest routing weights among the first
    choices of content tokens, one per prompt and language: its answers at other efforts say nearly the same.
    """
    kept = tokens.filter(pl.col("segment").is_in(CONTENT_SEGMENTS)).select("doc_id", "pos", "group_id", "lang")
    first = run.routing.select(
        "doc_id",
        "pos",
        "layer",
        expert=pl.col("expert_ids").list.first(),
        weight=pl.col("routing_weights").list.first(),
    ).collect()
    best = (
        first.join(kept, on=["doc_id", "pos"])
        .sort("weight", "doc_id", "pos", descending=[True, False, False])
        .unique(["layer", "expert", "group_id", "lang"], keep="first", maintain_order=True)
        .group_by("layer", "expert", maintain_order=True)
        .head(N_CONTEXTS)
    )
    texts = {doc: part["token"].to_list() for (doc,), part in tokens.sort("doc_id", "pos").group_by("doc_id")}
    rows = []
    for row in best.sort("layer", "expert", maintain_order=True).iter_rows(named=True):
        pieces, pos = texts[row["doc_id"]], row["pos"]
        around = "".join(pieces[max(pos - WIDTH, 0) : pos]), pieces[pos], "".join(pieces[pos + 1 : pos + 1 + WIDTH])
        rows.append((row["layer"], row["expert"], row["lang"], *around, row["weight"]))
    names = ["layer", "expert", "lang", "before", "token", "after", "weight"]
    return pl.DataFrame(rows, schema=names, orient="row")


def atlas_cards(frames: Mapping[str, pl.DataFrame]) -> list[Card]:
    """Cards in order of layer and expert; sentences are filled from frames, and what was not measured is left out."""
    load = frames["load_by_language"].group_by("layer", "expert").agg(pl.col("slots").sum())
    places = load.with_columns(pl.col("layer", "expert").cast(pl.Int64)).sort("layer", "expert")
    if len(places) > MAX_CARDS:
        flagged = flagged_experts(frames).select(pl.col("layer", "expert").cast(pl.Int64), first=pl.lit(True))
        ranked = places.join(flagged, on=["layer", "expert"], how="left", maintain_order="left")
        first = pl.col("first").fill_null(False)  # polars sorts nulls before everything
        places = ranked.sort(first, "slots", descending=True, maintain_order=True).head(MAX_CARDS)
        places = places.sort("layer", "expert")
    shown = {**frames, "preferred": clear_preferences(frames["preferences"]), "companions": companions(frames["pairs"])}
    index = {name: _by_place(shown[name]) for name in _USED if not shown.get(name, pl.DataFrame()).is_empty()}
    return [
        _card(layer, expert, index, "calibrated" in frames) for layer, expert in places.select("layer", "expert").rows()
    ]


def companions(pairs: pl.DataFrame) -> pl.DataFrame:
    """Both ends of every pair chosen together more than the null allows: layer, expert, other, log2_lift with
    its interval, p_adjusted, most first."""
    _, edges = expert_graph(pairs, min_log2_lift=0.0)
    ends = [
        edges.select("layer", pl.col(a).alias("expert"), pl.col(b).alias("other"), *LIFT, "p_adjusted")
        for a, b in (("expert", "other"), ("other", "expert"))
    ]
    return pl.concat(ends).sort("log2_lift", descending=True, maintain_order=True)


_USED = (
    "load", "shared", "contrasts", "stability", "preferred", "companions", "committee", "use", "words", "writes",
    "contribution", "removal", "audit", "contexts", "peaks",
)  # fmt: skip
Rows = Mapping[tuple[int, int], Sequence[dict]]


def _by_place(frame: pl.DataFrame) -> Rows:
    parts = frame.with_columns(pl.col("layer", "expert").cast(pl.Int64)).partition_by(
        "layer", "expert", as_dict=True, maintain_order=True
    )
    return {(int(layer), int(expert)): part.to_dicts() for (layer, expert), part in parts.items()}


def _card(layer: int, expert: int, index: Mapping[str, Rows], judged: bool) -> Card:
    def rows(name: str) -> Sequence[dict]:
        return index.get(name, {}).get((layer, expert), [])

    facts = [Fact("load", _load(rows("load")))]
    facts += [
        Fact("prefers", text)
        for text in (_prefers(rows("shared") or rows("contrasts"), rows("stability"), judged),)
        if text
    ]
    facts += [Fact("also prefers", text) for text in (_also(rows("preferred")),) if text]
    if rows("companions"):
        near = [f"expert {row['other']} (log2 lift {_lift(row)})" for row in rows("companions")[:3]]
        facts.append(Fact("together with", ", ".join(near)))
    facts += [Fact("committee", _standing(row)) for row in rows("committee") if row["committee"]]
    if rows("use"):
        used = sorted(rows("use"), key=lambda row: -row["f"])
        facts.append(Fact("where", ", ".join(f"{row['segment']} {row['f']:.0%}" for row in used[:4]) + " of tokens"))
    if rows("words"):
        facts.append(Fact("takes", "  ".join(f"{row['token']!r}" for row in rows("words"))))
    for row in rows("writes"):
        if row["raises"]:
            facts.append(Fact("raises", "  ".join(map(repr, row["raises"]))))
            facts.append(Fact("lowers", "  ".join(map(repr, row["lowers"]))))
    facts += [Fact("adds", _adds(row)) for row in rows("contribution") if row["n_slots"]]
    facts += [Fact("removed", _removed(row)) for row in rows("removal") if known(row["kl"])]
    facts += [Fact(f"audit, {row['kind']}", _audited(row)) for row in rows("audit")]
    facts += [Fact("super expert", f"peak output {row['peak']:.0f}") for row in rows("peaks") if row["super"]]
    shown = [(row["before"], row["token"], row["after"], row["lang"]) for row in rows("contexts")]
    is_flagged = any(row.get("flagged") for row in rows("shared") or rows("contrasts"))
    return Card(layer, expert, facts, shown, is_flagged)


def _lift(row: dict) -> str:
    value, low, high = (row[name] for name in LIFT)
    return estimate(value, low, high, "+.1f")


def _load(rows: Sequence[dict]) -> str:
    return ", ".join(
        f"{NAMES.get(row['lang'], row['lang'])} {estimate(row['load'], row['low'], row['high'], '.1%')} of slots "
        f"({row['load'] / row['null']:.1f}x uniform)"
        for row in rows
    )


def _prefers(rows: Sequence[dict], stability: Sequence[dict], judged: bool) -> str:
    """How sure, in one sentence; a difference that is not flagged is called none, if there are floors to judge by."""
    if not rows or not known(rows[0]["risk_difference"]):
        return ""
    row = rows[0]
    numbers = f"JA - EN {estimate(row['risk_difference'], row['low'], row['high'], '+.3f')}"
    if known(row["p_adjusted"]):
        numbers += f", adjusted p {row['p_adjusted']:.4f}"
    if known(row.get("logit_d")):
        numbers += f", logit {row['logit_d']:+.2f} sd"
    if not judged:
        return f"not judged: no calibrated floors for this run ({numbers})"
    if not row["flagged"]:
        return f"no language beyond the floors ({numbers})"
    share = stability[0]["stability"] if stability else None
    kept = f"; beyond the floors in {share:.0%} of half samples" if known(share) else ""
    return f"{NAMES['ja' if row['side'] > 0 else 'en']} ({numbers}){kept}"


def _also(rows: Sequence[dict]) -> str:
    """The three largest preferences apart from language."""
    shown = [row for row in rows if row["axis"] != "lang"][:3]
    numbers = [estimate(row["difference"], row["low"], row["high"], "+.2f") for row in shown]
    names = [f"{AXES[row['axis']]} {'from ' * (row['axis'] == 'position_bin')}{row['value']}" for row in shown]
    return "; ".join(f"{name} {number}" for name, number in zip(names, numbers, strict=True))


def _standing(row: dict) -> str:
    held = estimate(row["eci"], row["eci_low"], row["eci_high"], ".1%")
    return f"among the first k in {row['in_top']:.0%} of {row['n_conditions']} topics, with {held} of the probability"


def _adds(row: dict) -> str:
    return (
        f"|g E(x)| {estimate(row['reap'], row['reap_low'], row['reap_high'], '.2f')} where chosen, "
        f"{row['relative']:.1f} times the layer's mean; {row['output_share']:.1%} of all that the layer's experts add"
    )


def _removed(row: dict) -> str:
    losses = [
        f"{lang.upper()} {estimate(row[name], row[f'{name}_low'], row[f'{name}_high'], '+.4f')}"
        for lang, name in (("ja", "d_nll_ja"), ("en", "d_nll_en"))
        if known(row[name])
    ]
    return f"KL {estimate(row['kl'], row['kl_low'], row['kl_high'], '.4f')} nats; loss {', '.join(losses)}"


def _audited(row: dict) -> str:
    verdict = "more than matched controls" if row["p_kl"] <= 0.05 else "not certainly more than matched controls"
    verdict += ", judged by itself" if row["p_kl"] <= 0.05 < row["p_kl_adjusted"] else ""
    sizes = f"KL {row['kl']:.4f} against {row['control_kl']:.4f}"
    text = f"{verdict}: {sizes} (p {row['p_kl']:.3f}, adjusted {row['p_kl_adjusted']:.3f}, {row['n_controls']} draws)"
    if not known(row["selectivity"]):
        return text
    selective = estimate(row["selectivity"], row["selectivity_low"], row["selectivity_high"], "+.2f")
    return f"{text}; selectivity {selective} (p {row['p_selective']:.3f})"
