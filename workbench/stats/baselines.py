"""What simpler accounts already explain: standing committees, anchor tokens, and the geometry of the hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from scipy.stats import rankdata

from workbench.errors import FrameError
from workbench.stats.index import Frame, Ints, check_counts, check_experts, codes, locate
from workbench.stats.information import mixed
from workbench.stats.load import frequency_cube, slot_counts
from workbench.stats.resampling import Floats, block_jackknife, pair_jackknife


def committee(
    cells: pl.DataFrame, axis: str, n_experts: int, k: int, value: str = "prob", least: float = 0.8,
    unit: str = "group_id",
) -> pl.DataFrame:  # fmt: skip
    """Experts that every condition relies on: one row per layer and expert.

    cells: `logits.logit_cells` by [unit, axis] (value "prob": mean router probability, the ECI of arXiv 2601.03425,
    here over content tokens and not at the last template token, which is the same in every domain). Columns layer,
    expert, eci (mean over conditions), mean_rank, rank_variance, in_top (share of conditions in which it is among the k
    first), candidate (in_top >= least), committee (on the Pareto front of mean rank and rank variance among
    candidates), size, coverage (share of all probability that the committee holds), density_ratio ((coverage / size) /
    ((1 - coverage) / (E - size)); 1 is the null of an even router), n_conditions, n_units. Conditions weigh equally,
    units within them too.

    eci_low, coverage_low, density_ratio_low and _high: delete-a-group jackknife over units, of the committee that was
    found; stability: the share of those leavings-out in which the expert is still, or still not, in the committee.
    """
    check_counts(cells, n_experts)
    conditions, layers = cells[axis].unique().sort().to_list(), cells["layer"].unique().sort().to_list()
    names = cells[unit].unique().sort()
    cube = np.full((len(conditions), len(names), len(layers), n_experts), np.nan)
    row = cells[unit].replace_strict(names, pl.int_range(len(names), eager=True)).to_numpy()
    depth = np.searchsorted(layers, cells["layer"].to_numpy())
    cube[codes(cells[axis]), row, depth, cells["expert"].to_numpy()] = cells[value].to_numpy()

    wide, front = _committee(cube, k, least)
    size, seen = front.sum(1), []

    def measures(kept: np.ndarray) -> Floats:  # [expert + 2 layer]
        found, members = _committee(cube[:, kept], k, least)
        seen.append(members == front)
        coverage = (found["eci"] * front).sum(1)
        return np.concatenate([found["eci"].T, coverage[None], _density_ratio(coverage, size, n_experts)[None]])

    estimate, low, high = block_jackknife(measures, len(names))
    columns = {**wide, "committee": front, "eci_low": low[:-2].T, "eci_high": high[:-2].T}
    columns |= {"stability": np.mean(seen[1:], axis=0) if seen[1:] else np.full(front.shape, np.nan)}
    per_layer = {"size": size}
    for place, name in ((-2, "coverage"), (-1, "density_ratio")):
        per_layer |= {name: estimate[place], f"{name}_low": low[place], f"{name}_high": high[place]}
    return pl.DataFrame(
        {
            "layer": np.repeat(np.array(layers, dtype=np.int64), n_experts),
            "expert": np.tile(np.arange(n_experts), len(layers)),
            **{name: values.ravel() for name, values in columns.items()},
            **{name: np.repeat(values, n_experts) for name, values in per_layer.items()},
        }
    ).with_columns(n_conditions=pl.lit(len(conditions)), n_units=pl.lit(len(names)))


def _committee(cube: Floats, k: int, least: float) -> tuple[dict[str, Floats], np.ndarray]:
    """Measures by name and who is in the committee, each [layer expert], of [condition unit layer expert]."""
    known = np.isfinite(cube)
    table = np.where(known, cube, 0).sum(1) / np.maximum(known.sum(1), 1)  # [condition layer expert]
    table /= np.maximum(table.sum(-1, keepdims=True), 1e-300)
    rank = rankdata(-table, axis=-1)
    capped = np.where(rank <= k, rank, k + 1)
    in_top, mean, variance = (rank <= k).mean(0), capped.mean(0), capped.var(0)
    front = np.stack([_pareto(mean[at], variance[at], in_top[at] >= least) for at in range(len(mean))])
    measures = {"eci": table.mean(0), "mean_rank": mean, "rank_variance": variance, "in_top": in_top}
    return measures | {"candidate": in_top >= least}, front


def _density_ratio(coverage: Floats, size: np.ndarray, n_experts: int) -> Floats:  # [layer] each
    inside, outside = coverage / np.maximum(size, 1), (1 - coverage) / np.maximum(n_experts - size, 1)
    return np.where((size > 0) & (outside > 0), inside / np.maximum(outside, 1e-300), np.nan)


def _pareto(mean: Floats, variance: Floats, candidate: np.ndarray) -> np.ndarray:
    """Candidates that no other candidate equals or beats in both and beats in one."""
    no_worse = (mean[:, None] <= mean) & (variance[:, None] <= variance)
    better = (mean[:, None] < mean) | (variance[:, None] < variance)
    return candidate & ~(no_worse & better & candidate[:, None]).any(0)


def anchor_pmi(
    tokens: Frame, routing: Frame, anchors: pl.DataFrame, n_experts: int, segments: Sequence[str] | None = None,
    unit: str = "group_id",
) -> pl.DataFrame:  # fmt: skip
    """Normalised pointwise mutual information of an expert and a kind of anchor token (RICE, arXiv 2505.14681).

    anchors: doc_id, pos, event (`events.thought_switches`, `events.channel_changes` ...). For each event, layer and
    expert nPMI = [log2(n_at / M) + log2(T / K)] / log2(T / n_at) with n_at = anchors that chose the expert, M =
    anchors, K = all tokens that chose it, T = all tokens; 1: chosen at anchors only and always, 0 (the null): like
    anywhere, null where n_at = 0. Columns event, layer, expert, npmi, low, high (delete-a-group jackknife over units),
    rate (n_at / M), base_rate (K / T), n_anchors, n_tokens, n_units, n_tests. With anchors of one word this measures
    the word: compare it with the same word elsewhere before calling it reasoning. segments: which tokens count; None
    for all.
    """
    frame = tokens.lazy().collect()
    kept = frame if segments is None else frame.filter(pl.col("segment").is_in(segments))
    names = kept["segment"].unique().to_list()
    place = locate(kept.select("doc_id", "pos"), anchors.select("doc_id", "pos"))
    found = anchors.filter(pl.Series(place >= 0))
    label = np.full(len(kept), "", dtype=object)
    label[place[place >= 0]] = found["event"].to_list()
    marked = kept.with_columns(event=pl.Series(label.tolist()))
    counts = slot_counts(marked, routing, [unit, "event"], names)
    check_experts(counts["expert"].max(), n_experts)  # type: ignore[arg-type]
    units, events = codes(counts[unit]), counts["event"].unique().sort().to_list()
    layers = counts["layer"].unique().sort().to_list()
    slots = np.zeros((int(units.max(initial=-1)) + 1, len(events), len(layers), n_experts))
    depth, expert = np.searchsorted(layers, counts["layer"].to_numpy()), counts["expert"].cast(pl.Int64).to_numpy()
    slots[units, codes(counts["event"]), depth, expert] = counts["slots"].to_numpy()
    sizes = np.zeros(slots.shape[:2])
    sizes[units, codes(counts["event"])] = counts["n_tokens"].to_numpy()
    at = [number for number, name in enumerate(events) if name]
    estimate, low, high = block_jackknife(lambda kept_: _npmi(slots[kept_].sum(0), sizes[kept_].sum(0))[at], len(slots))
    total, n = slots.sum(0), sizes.sum(0)
    shape = estimate.shape
    which, layer_at, expert_at = np.indices(shape).reshape(3, -1)
    return pl.DataFrame(
        {
            "event": np.array(events, dtype=object)[at][which].tolist(),
            "layer": np.array(layers, dtype=np.int64)[layer_at],
            "expert": expert_at,
            "npmi": estimate.ravel(),
            "low": low.ravel(),
            "high": high.ravel(),
            "rate": (total[at] / n[at][:, None, None]).ravel(),
            "base_rate": np.broadcast_to(total.sum(0) / n.sum(), shape).ravel(),
            "n_anchors": n[at][which].astype(np.int64),
        }
    ).with_columns(
        pl.col("npmi", "low", "high").fill_nan(None),
        n_tokens=pl.lit(len(kept)), n_units=pl.lit(len(slots)), n_tests=pl.lit(estimate.size),
    )  # fmt: skip


def _npmi(slots: Floats, sizes: Floats) -> Floats:  # [event layer expert], [event] -> [event layer expert]
    total, everywhere = sizes.sum(), slots.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.log2(slots / sizes[:, None, None]) + np.log2(total / everywhere)
        npmi = gain / np.log2(total / slots)
    return np.where(slots > 0, npmi, np.nan)


def geometry_baseline(
    counts: pl.DataFrame, hidden: pl.DataFrame, labels: pl.DataFrame, axis: str, n_experts: int, n_shuffles: int = 999,
    seed: int = 0, unit: str = "group_id",
) -> pl.DataFrame:  # fmt: skip
    """How much of the likeness of routes is likeness of hidden states (arXiv 2604.09780): one row per layer.

    Router logits are linear in the hidden state, so documents that look alike are routed alike whatever experts are
    for. counts: `load.slot_counts` by [doc_id]; hidden: doc_id, layer, mean_in (list; mean router input of the
    document, from `capture.router_inputs`); labels: doc_id, `axis` and `unit`. Over all pairs of documents routing
    similarity (sum of sqrt(q q'), 1 for the same distribution) is regressed on the cosine of the centred hidden states
    and its square. Columns layer, r2, gap (mean similarity of pairs of the same label less that of different ones),
    gap_residual (the same of the residuals: what geometry leaves), each with _low and _high, p, n_docs, n_pairs,
    n_units. Null of gap_residual: the labels are exchanged within units that have several, else between units; p is
    one-sided. Documents of one unit and label, say a text at three efforts, keep one label: they are alike whatever the
    label means. Without `unit` in labels every document is taken for a text of its own.

    Intervals: 95%, jackknife over the units of both documents (`resampling.pair_jackknife`), fitted anew. p rests on
    which documents have which label, the interval on which were read: with few units they may disagree near 0. Null
    where there is nothing to compare, as with one label.
    """
    check_experts(counts["expert"].max(), n_experts)  # type: ignore[arg-type]
    docs = labels.join(counts.select("doc_id").unique(), on="doc_id").unique("doc_id").sort("doc_id")
    place = {name: number for number, name in enumerate(docs["doc_id"])}
    label = codes(docs[axis])
    upper = np.triu_indices(len(docs), 1)
    rng = np.random.default_rng(seed)
    owner = codes(docs[unit]) if unit in docs.columns else np.arange(len(docs))
    n_units = int(owner.max(initial=-1)) + 1
    shuffles, same = [label, *_exchanged_labels(label, owner, n_shuffles, rng)], label[upper[0]] == label[upper[1]]
    rows = []
    for layer in counts["layer"].unique().sort().to_list():
        routes, states = _document_vectors(counts, hidden, layer, place, n_experts)
        likeness, cosine = (np.sqrt(routes) @ np.sqrt(routes).T)[upper], _centred_cosine(states)[upper]

        def measures(some: np.ndarray, likeness: Floats = likeness, cosine: Floats = cosine) -> Floats:
            return np.array(_geometry(likeness[some], cosine[some], same[some])[:3])

        numbers = np.stack(pair_jackknife(measures, owner[upper[0]], owner[upper[1]]), axis=1).ravel()
        residual = _geometry(likeness, cosine, same)[3]
        gaps = [_gap(residual, shuffled[upper[0]] == shuffled[upper[1]]) for shuffled in shuffles]
        p = sum(gap >= gaps[0] - 1e-15 for gap in gaps) / len(gaps) if np.isfinite(gaps[0]) else np.nan
        rows.append((layer, *numbers.tolist(), p, len(docs), len(upper[0]), n_units))
    measured = [f"{name}{end}" for name in ("r2", "gap", "gap_residual") for end in ("", "_low", "_high")]
    sizes = {"n_docs": pl.Int64, "n_pairs": pl.Int64, "n_units": pl.Int64}
    schema = {"layer": pl.Int64, **dict.fromkeys([*measured, "p"], pl.Float64), **sizes}
    return pl.DataFrame(rows, schema=schema, orient="row").with_columns(pl.col(pl.Float64).fill_nan(None))


def _geometry(likeness: Floats, cosine: Floats, same: np.ndarray) -> tuple[float, float, float, Floats]:
    """r2, gap, gap_residual and the residuals, of pairs [pair]: likeness of routes, cosine of states, same label."""
    if len(cosine) < 2 or likeness.std() < 1e-12:
        return np.nan, np.nan, np.nan, np.full(len(cosine), np.nan)
    design = np.stack([np.ones_like(cosine), cosine, cosine**2], axis=1)
    residual = likeness - design @ np.linalg.lstsq(design, likeness, rcond=None)[0]
    r2 = 1 - residual.var() / likeness.var()
    return r2, _gap(likeness, same), _gap(residual, same), residual


def _exchanged_labels(label: Ints, owner: Ints, n: int, rng: np.random.Generator) -> list[Ints]:
    """n shuffles of the labels [doc], those of an owner (unit) and label together."""
    cell = owner * (label.max(initial=0) + 1) + label
    _, first, place = np.unique(cell, return_index=True, return_inverse=True)
    several = len(first) > len(np.unique(owner))
    stratum = owner[first] if several else np.zeros_like(first)
    return [mixed(label[first], stratum, rng)[place] for _ in range(n)]


def _document_vectors(
    counts: pl.DataFrame, hidden: pl.DataFrame, layer: int, place: dict[str, int], n_experts: int
) -> tuple[Floats, Floats]:
    """Expert use q [doc expert] and mean router input [doc d_model] of one layer."""
    part = counts.filter(pl.col("layer") == layer)
    routes = np.zeros((len(place), n_experts))
    routes[[place[name] for name in part["doc_id"]], part["expert"].to_numpy()] = part["slots"].to_numpy()
    states = {
        name: vector for name, vector in hidden.filter(pl.col("layer") == layer).select("doc_id", "mean_in").rows()
    }
    missing = [name for name in place if name not in states]
    if missing:
        raise FrameError(
            f"hidden: expected every document in layer {layer}, got none for {missing[0]}. Capture it too."
        )
    return routes / routes.sum(1, keepdims=True), np.array([states[name] for name in place], dtype=np.float64)


def _centred_cosine(states: Floats) -> Floats:
    centred = states - states.mean(0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-300)
    return unit @ unit.T


def _gap(values: Floats, same: np.ndarray) -> float:
    return float(values[same].mean() - values[~same].mean()) if same.any() and not same.all() else np.nan


def translation_retrieval(counts: pl.DataFrame, axis: str, values: Sequence[str], n_experts: int) -> pl.DataFrame:
    """Is a document's translation the one routed most alike? One row per layer.

    counts: `load.slot_counts` by [group_id, axis]. Hellinger similarity of expert use; columns layer, hits (share of
    groups whose two versions find each other first, mean of both directions), low, high (95%, Wilson 1927, groups as
    trials), chance (1 / n_groups: the null), n_groups. One number for how far routes follow content across languages
    (retrieval is the usual test of parallel sentences; of routes it is this project's). Raises FrameError for fewer
    than two pairs.
    """
    groups, layers, cube = frequency_cube(counts, axis, values, n_experts)
    n = len(groups)
    if n < 2:
        raise FrameError(
            f"counts: expected two groups or more with both {' and '.join(values)}, got {n}. Pass more pairs."
        )
    root = np.sqrt(cube / np.maximum(cube.sum(-1, keepdims=True), 1e-300))  # [value group layer expert]
    likeness = np.einsum("gle,hle->lgh", *root)  # [layer group group]
    found = [(likeness.argmax(axis) == np.arange(n)).mean(-1) for axis in (1, 2)]
    hits = np.mean(found, axis=0)
    z2 = 1.959964**2
    center, half = (
        (hits + z2 / (2 * n)) / (1 + z2 / n),
        np.sqrt(z2 * (hits * (1 - hits) / n + z2 / (4 * n**2))) / (1 + z2 / n),
    )
    columns = {"layer": layers, "hits": hits, "low": center - half, "high": center + half}
    return pl.DataFrame(columns).with_columns(chance=pl.lit(1 / n), n_groups=pl.lit(n))
