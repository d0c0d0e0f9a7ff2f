"""One or two sentences under a figure of the page; every number in them is computed."""

from __future__ import annotations

import math

import polars as pl

from workbench.stats.coactivation import expert_graph
from workbench.study.wording import counted, estimate, known

Frames = dict[str, pl.DataFrame]
LIFT = ("log2_lift", "log2_lift_low", "log2_lift_high")
ENOUGH = 5.0  # expected counts
FEW_RUNS = 100
STABLE = 0.8  # share of half samples (Meinshausen & Buhlmann 2010)


def remarks(frames: Frames) -> dict[str, str]:
    """The page's facts evenness, fertility, again, vocabulary, in_a_row, companions, steps, committee, geometry, turns
    and margins; empty for what was not measured."""
    return {
        "evenness": _evenness(frames),
        "fertility": _fertility(frames),
        "again": _again(frames),
        "vocabulary": _vocabulary(frames["vocabulary"]),
        "in_a_row": " ".join(filter(None, (_in_a_row(frames["in_a_row"]), _dwell(frames["dwell"])))),
        "companions": _companions(frames["pairs"]),
        "steps": _steps(frames),
        "committee": _committee(frames),
        "geometry": _geometry(frames),
        "turns": _turns(frames),
        "margins": _margins(frames["margins"]),
    }


def _evenness(frames: Frames) -> str:
    """How even the load is at each scope, and what pooling the layers would hide."""
    losses, scopes = frames["auxiliary"], frames["scopes"]
    mean, pooled = (
        losses.row(by_predicate=pl.col("scope") == scope, named=True) for scope in ("mean of layers", "pooled")
    )
    text = (
        "Concentration of the load (E times the sum of squared loads, the part of the balancing loss that counts "
        f"tokens; 1 where even) is {estimate(mean['value'], mean['low'], mean['high'], '.3f')} on average over layers."
    )
    if pooled["value"] < mean["value"] - 0.001:
        text += (
            " Pooled over layers, as some training code does, it would be "
            f"{estimate(pooled['value'], pooled['low'], pooled['high'], '.3f')}: expert 5 of one layer is not expert 5 "
            "of another, so pooling lets unevenness cancel."
        )
    means = scopes.group_by("scope").agg(pl.col("entropy_corrected").mean())
    even = dict(means.rows())
    shown = ", ".join(f"{even[scope]:.3f} {name}" for scope, name in SCOPES.items() if known(even.get(scope)))
    return (
        f"{text} Entropy of the load as a share of its maximum, corrected for sample size, mean over layers: {shown}."
    )


SCOPES = {"document": "within a document", "language": "within a language", "global": "over everything"}


def _in_a_row(in_a_row: pl.DataFrame) -> str:
    """Where one set of experts serves tokens in a row best, against the same tokens shuffled."""
    if in_a_row.is_empty():
        return ""
    gains = in_a_row.with_columns(gain=pl.col("srp") - pl.col("null")).sort(
        "gain", descending=True, maintain_order=True
    )
    top = gains.row(0, named=True)
    if top["gain"] < 0.001:
        return "No layer serves tokens in a row better than shuffled ones."
    return (
        f"The largest gain over shuffled tokens is in layer {top['layer']}: one set of experts serves {top['m']} "
        f"tokens in a row with F1 {estimate(top['srp'], top['low'], top['high'], '.3f')}, and as many tokens from "
        f"anywhere with {top['null']:.3f}."
    )


def _dwell(dwell: pl.DataFrame) -> str:
    """Where an expert stays chosen longest beyond what its load gives."""
    known = dwell.filter(pl.col("age") == 1, pl.col("excess").is_not_null())
    if known.is_empty():
        return ""
    top = known.sort("excess", descending=True, maintain_order=True).row(0, named=True)
    text = (
        f"In layer {top['layer']} the next token leaves {top['hazard']:.0%} of the experts just taken up, where their "
        f"load alone would have it leave {top['null']:.0%} "
        f"(difference {estimate(top['excess'], top['excess_low'], top['excess_high'], '.3f')})"
    )
    later = dwell.filter(layer=top["layer"], age=4).filter(pl.col("n_at_risk") >= FEW_RUNS)
    for row in later.iter_rows(named=True):
        text += f", and of those kept for four tokens {row['hazard']:.0%} instead of {row['null']:.0%}"
    return f"{text}."


def _turns(frames: Frames) -> str:
    """What is significant around the turns of an answer, mean over layers."""
    if "events_mean" not in frames:
        return ""
    lines = []
    for (turn, value), part in frames["events_mean"].group_by("turn", "value", maintain_order=True):
        sure = part.filter(pl.col("p_adjusted") <= 0.05)
        row = part.row(0, named=True)
        sizes = f"{counted(row['n_events'], 'place')} against {row['n_controls']:,} in {row['n_groups']:,} groups"
        if sure.is_empty():
            lines.append(f"{str(turn).capitalize()}, {EVENT_VALUES[str(value)]}: no significant difference ({sizes}).")
            continue
        top = sure.sort(pl.col("difference").abs(), descending=True, maintain_order=True).row(0, named=True)
        lines.append(
            f"{str(turn).capitalize()}, {EVENT_VALUES[str(value)]}: {len(sure)} of {len(part)} places differ, most "
            f"token {top['offset']:+d} by {estimate(top['difference'], top['low'], top['high'], '+.3f')} ({sizes})."
        )
    return f"{' '.join(lines)} p at most 0.05, corrected over the places of a turn."


EVENT_VALUES = {"router_entropy": "router entropy in nats", "turnover": "share of experts changed"}


def _margins(margins: pl.DataFrame) -> str:
    """How many choices numerical noise could flip."""
    if margins.is_empty():
        return ""
    top = margins.sort("near_0.1", descending=True, maintain_order=True).row(0, named=True)
    ties = round((margins["ties"] * margins["n_tokens"]).sum())
    return (
        f"Choices are closest in layer {top['layer']}: for "
        f"{estimate(top['near_0.1'], top['near_0.1_low'], top['near_0.1_high'], '.1%')} of its tokens the margin is "
        f"below 0.1 logits, which the rounding of bfloat16 can flip (2606.03780); its median is {top['median']:.2f}. "
        + f"Exact ties decide {ties:,} of {margins['n_tokens'].sum():,} choices of a token and layer."
    )


def _fertility(frames: Frames) -> str:
    if "fertility" not in frames:
        return ""
    row = frames["fertility"].row(0, named=True)
    return (
        f"The tokenizer makes {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}] times as many tokens of a "
        f"Japanese prompt as of its English version ({row['n_groups']} groups; {row['chars_per_token_first']:.1f} "
        f"against {row['chars_per_token_second']:.1f} characters per token), which is why groups weigh equally and "
        "not tokens."
    )


def _topics(frames: Frames) -> str:
    """How much of what differs on all words hangs on one topic."""
    if "without_topic" not in frames:
        return ""
    certain = frames["contrasts"].filter(pl.col("p_adjusted") <= 0.05)
    if certain.is_empty() or frames["without_topic"]["least"].null_count():
        return ""
    without = frames["without_topic"].join(certain.select("layer", "expert"), on=["layer", "expert"], how="semi")
    kept = without.filter(pl.col("least") >= 0.5 * pl.col("risk_difference").abs())
    return (
        f" Of the {counted(len(without), 'expert')} that differ significantly on all words, {len(kept)} keep at least "
        f"half of their difference whichever of the {without['n_labels'][0]} topics is left out."
    )


def _again(frames: Frames) -> str:
    """Of what was found, how much would be found again."""
    found = _found_again(frames)
    return f"{found}{_topics(frames)}" if found else ""


def _found_again(frames: Frames) -> str:
    if "reliability" not in frames or not frames["reliability"]["spearman"].is_finite().all():
        return ""  # fewer than four groups
    halves = frames["reliability"]
    least, most = halves["spearman"].to_numpy().min(), halves["spearman"].to_numpy().max()
    text = (
        f"Two random halves of the {halves['n_groups'][0]} groups agree on how the experts of a layer rank by their "
        f"difference: mean rank correlation {least:.2f} to {most:.2f} over layers."
    )
    if "replication" not in frames:
        return text
    found, flagged = frames["replication"], frames.get("shared", frames["contrasts"]).filter("flagged")
    if found.is_empty() and flagged.is_empty():
        return f"{text} No expert is flagged, on the groups kept for discovery alone or on all of them."
    stable = flagged.join(frames["stability"].filter(pl.col("stability") >= STABLE), on=["layer", "expert"], how="semi")
    return (
        f"{text} Of {counted(len(found), 'expert')} flagged on the groups kept for discovery alone "
        f"{found['replicated'].sum()} differ again on the other groups, which had no part in choosing them. Of the "
        f"{len(flagged)} flagged on all groups {len(stable)} lie beyond the floors, the same way, in at least "
        f"{STABLE:.0%} of random half samples."
    )


def _vocabulary(vocabulary: pl.DataFrame) -> str:
    known = vocabulary.filter(pl.col("n_types") > 0).sort("excess")
    if known.is_empty():
        return ""
    least, most = (known.row(place, named=True) for place in (0, -1))
    return (
        f"Of the {most['n_types']:,} words that occur often enough, the average one sends "
        f"{most['specialisation']:.0%} of its tokens to one first expert in layer {most['layer']}, where most, and "
        f"{least['specialisation']:.0%} in layer {least['layer']}, where fewest; the load of the experts alone would "
        f"make it {most['null']:.0%} and {least['null']:.0%}. Corrected for load that is "
        f"{most['excess']:.2f} [{most['low']:.2f}, {most['high']:.2f}] and "
        f"{least['excess']:.2f} [{least['low']:.2f}, {least['high']:.2f}], 1 being a word with an expert of its own."
    )


def _steps(frames: Frames) -> str:
    if "steps" not in frames:
        return ""
    steps = frames["steps"]
    edges = steps.filter(pl.col("p_adjusted") <= 0.05, pl.col("log2_lift") >= 0.5)
    text = (
        f"From layer to layer, {len(edges):,} of {len(steps):,} pairs of an expert and one of the next layer follow "
        "each other at least 1.4 times as often as when the tokens of a document take each other's way there."
    )
    for row in _most(edges):
        text += (
            f" Most so: expert {row['expert']} of layer {row['layer']} and {row['other']} of layer "
            f"{row['next_layer']}, {_often(row)}."
        )
    return f"{text} {_paths(frames['path_entropy'].row(0, named=True))}"


def _paths(row: dict) -> str:
    """The ways through all layers at once, against a chain that knows the layer before alone."""
    verdict = "fewer ways than" if row["p"] <= 0.05 else "not certainly fewer ways than"
    return (
        f"First experts make {row['n_paths']:,} paths through all layers ({row['n_distinct']:,} where each counts once "
        f"per group): {verdict} if each layer knew the one before alone, by {row['excess']:.3f} bits "
        f"(p {row['p']:.2f}; {row['path_entropy']:.2f} bits against {row['null_low']:.2f} to {row['null_high']:.2f} in "
        "95% of exchanges; both grow with the amount of text)."
    )


def _most(edges: pl.DataFrame) -> list[dict]:
    """The edge of the largest lift among those with enough expected counts to speak of."""
    known = edges.filter(pl.col("expected") >= ENOUGH)
    return known.sort("log2_lift", descending=True, maintain_order=True).head(1).to_dicts()


def _often(row: dict) -> str:
    """How often a pair of experts was chosen together, and how much more than by chance."""
    times, low, high = (None if row[name] is None else 2.0 ** row[name] for name in LIFT)
    more = "" if times is None else f", {estimate(times, low, high, '.1f')} times as often"
    return f"{row['together']:,} times against {row['expected']:,.0f} expected{more}"


def _companions(pairs: pl.DataFrame) -> str:
    if pairs.is_empty():
        return ""  # a layer of one expert
    _, edges = expert_graph(pairs)
    text = (
        f"{len(edges):,} of {len(pairs):,} pairs of experts of one layer work on the same token at least 1.4 times as "
        "often as they would by chance, given how often every document uses each of them (p at most 0.05 after "
        f"correction; {pairs['n_tokens'][0]:,} tokens of {pairs['n_docs'][0]:,} documents)."
    )
    for row in _most(edges):
        text += (
            f" Most so: experts {row['expert']} and {row['other']} of layer {row['layer']}, {_often(row)} (the largest "
            "of many: expect less in other text)."
        )
    return text


def _committee(frames: Frames) -> str:
    if "committee" not in frames:
        return ""
    layers = frames["committee"].unique("layer", keep="first").filter(pl.col("size") > 0)
    if layers.is_empty():
        return "No layer has experts that nearly every topic relies on."
    row = layers.sort("coverage", descending=True).row(0, named=True)
    held = estimate(row["coverage"], row["coverage_low"], row["coverage_high"], ".1%")
    return (
        f"In {len(layers)} of {counted(frames['committee']['layer'].n_unique(), 'layer')} some experts are among the "
        f"first for nearly every topic. They hold most of the router's probability in layer {row['layer']}: "
        f"{counted(row['size'], 'expert')} {held}, {row['density_ratio']:.1f} times as much per expert as the others."
    )


def _geometry(frames: Frames) -> str:
    frame = frames.get("geometry", pl.DataFrame())
    if frame.is_empty() or frame["n_docs"][0] < 4 or not frame["gap_residual"].fill_null(math.nan).is_finite().all():
        return ""
    r2, left = frame["r2"].to_numpy(), (frame["gap_residual"] / frame["gap"]).to_numpy()
    low = frame["gap_residual_low"].fill_nan(None).drop_nulls()  # none where groups are few
    above = f"; its 95% interval lies above 0 in {(low > 0).sum()}" if len(low) else ""
    return (
        "Texts that look alike to a router are routed alike whatever experts are for. On a sample of "
        f"{frame['n_docs'][0]} documents the cosine of their hidden states explains {r2.min():.0%} to {r2.max():.0%} "
        "of the likeness of their routes over the layers. Of what texts of one language share beyond texts of two it "
        f"leaves {left.min():.0%} to {left.max():.0%}, more than chance (p at most 0.05) in "
        f"{(frame['p'] <= 0.05).sum()} of {counted(len(frame), 'layer')}{above}."
    )
