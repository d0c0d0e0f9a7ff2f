"""Two checkpoints of one lineage: how far their routers and their routes have moved apart.

Expert 5 of one model is expert 5 of another only if training kept it so; experts are matched by their router rows
first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from workbench.errors import FrameError
from workbench.stats.dynamics import shared_experts
from workbench.stats.index import Frame, Ints, check_choices, codes, token_array
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.stats.resampling import Floats, t_interval

Rows = Mapping[int, NDArray[np.floating]]  # layer -> router weight [expert d_model]
MARGIN_EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)


def match_experts(first: Rows, second: Rows, n_draws: int = 9, seed: int = 0) -> pl.DataFrame:
    """The one-to-one matching of experts with the largest summed cosine of router rows: one row per layer and expert.

    Columns layer, expert (of first), matched (of second), cosine (of the matched rows), own_cosine (with the expert of
    the same number), next_cosine (the best other), same (matched is the same number), null_cosine. Solved exactly (Kuhn
    1955; scipy.optimize.linear_sum_assignment). Cosine, because a row's length scales its logit and not its direction.
    No interval: rows are parameters; `router_drift` has that of their mean. Raises FrameError when layers or shapes
    differ.

    Null: an unrelated router of the same inner geometry. null_cosine is the mean cosine over the layer's experts when
    the second router's input axes are permuted and their signs flipped at random, which keeps all angles among its own
    rows, and the experts are matched anew; mean over `n_draws`. A matching always finds something: compare with this.
    """
    rng = np.random.default_rng(seed)
    if first.keys() != second.keys() or any(first[layer].shape != second[layer].shape for layer in first):
        raise FrameError("router rows: expected the same layers and shapes, got others. Compare models of one shape.")
    frames = []
    for layer in sorted(first):
        cosine = _cosine(first[layer], second[layer])  # [expert expert]
        expert, matched = linear_sum_assignment(-cosine)
        null = [_matched_mean(first[layer], _turned(second[layer], rng)) for _ in range(n_draws)]
        others = cosine.copy()
        others[expert, matched] = -np.inf
        frames.append(
            pl.DataFrame(
                {
                    "layer": np.full(len(expert), layer),
                    "expert": expert,
                    "matched": matched,
                    "cosine": cosine[expert, matched],
                    "own_cosine": cosine.diagonal(),
                    "next_cosine": others.max(1),
                    "same": expert == matched,
                    "null_cosine": np.full(len(expert), np.mean(null) if null else np.nan),
                }
            )
        )
    if not frames:
        raise FrameError("router rows: expected some layers, got none. Compare mixtures.")
    return pl.concat(frames).with_columns(pl.col("null_cosine").fill_nan(None))


def _cosine(first: NDArray[np.floating], second: NDArray[np.floating]) -> Floats:
    sides = (rows.astype(np.float64) for rows in (first, second))
    a, b = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300) for rows in sides)
    return a @ b.T


def _matched_mean(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    cosine = _cosine(first, second)
    return float(cosine[linear_sum_assignment(-cosine)].mean())


def _turned(rows: NDArray[np.floating], rng: np.random.Generator) -> Floats:
    n = rows.shape[1]
    return rows[:, rng.permutation(n)] * rng.choice((-1.0, 1.0), n)


def router_drift(matches: pl.DataFrame) -> pl.DataFrame:
    """`match_experts` per layer: columns layer, cosine (mean), cosine_low, cosine_high, least, next_cosine (mean),
    null_cosine, same (share of experts that kept their number), n_experts. This project's.

    Interval: 95%, Student's t over the layer's experts, as if these were draws of what training makes of experts; the
    rows themselves are known exactly. Null: null_cosine, two unrelated routers (see `match_experts`).
    """
    per_layer = {
        layer: t_interval(part["cosine"].to_numpy())
        for (layer,), part in matches.group_by("layer", maintain_order=True)
    }
    ends = [pl.Series([float(per_layer[layer][end]) for layer in sorted(per_layer)]) for end in (0, 1)]
    return (
        matches.group_by("layer")
        .agg(
            pl.col("cosine").mean(),
            least=pl.col("cosine").min(),
            next_cosine=pl.col("next_cosine").mean(),
            null_cosine=pl.col("null_cosine").first(),
            same=pl.col("same").mean(),
            n_experts=pl.len(),
        )
        .sort("layer")
        .with_columns(cosine_low=ends[0], cosine_high=ends[1])
    )


def routing_drift(
    tokens: Frame,
    first: Frame,
    second: Frame,
    matches: pl.DataFrame | None = None,
    segments: Sequence[str] = CONTENT_SEGMENTS,
) -> pl.DataFrame:
    """Share of the k experts that two checkpoints choose alike on the same tokens: one row per layer.

    first, second: routing frames of the two, on the same token ids; matches: `match_experts` of their routers, else
    numbers are taken as they are. Columns layer, overlap, low, high (95%, t over groups), null (two independent
    choices with the layers' loads: sum of f f' / k), first_same, n_tokens, n_groups. Router saturation of arXiv
    2409.02060. Its ceiling is no 1: run one checkpoint twice with another batch shape or dtype and read the drift
    beside that. Raises FrameError when either lacks a token.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).collect()
    layers, ids = _aligned(kept, first, second, matches)
    overlap = shared_experts(ids[0], ids[1]) / ids[0].shape[2]  # [token layer]
    per_group = _group_means(overlap, codes(kept["group_id"]))
    low, high = t_interval(per_group)
    n_experts = int(max(part.max(initial=0) for part in ids)) + 1
    f = [
        np.stack([np.bincount(part[:, place].ravel(), minlength=n_experts) for place in range(len(layers))])
        for part in ids
    ]
    n = len(layers)
    return pl.DataFrame(
        {
            "layer": layers,
            "overlap": per_group.mean(0),
            "low": low,
            "high": high,
            "null": (f[0] * f[1]).sum(1) / max(len(kept), 1) ** 2 / ids[0].shape[2],
            "first_same": (ids[0][..., 0] == ids[1][..., 0]).mean(0),
            "n_tokens": np.full(n, len(kept)),
            "n_groups": np.full(n, len(per_group)),
        }
    )


def _aligned(
    kept: pl.DataFrame, first: Frame, second: Frame, matches: pl.DataFrame | None
) -> tuple[list[int], tuple[np.ndarray, np.ndarray]]:
    """Layers and both choices [token layer k], the second in the first's numbers."""
    layers, a = token_array(kept, first)
    check_choices(a)
    other, b = token_array(kept, second)
    if layers != other or a.shape != b.shape:
        raise FrameError(
            f"routing: expected two with the same layers and k, got layers {layers} and {other}, "
            f"k {a.shape[-1]} and {b.shape[-1]}. Compare models of one shape."
        )
    if matches is None:
        return layers, (a, b)
    renamed = b.copy()
    for place, layer in enumerate(layers):
        here = matches.filter(pl.col("layer") == layer)
        number = np.zeros(int(here["matched"].to_numpy().max()) + 1, dtype=b.dtype)
        number[here["matched"].to_numpy()] = here["expert"].to_numpy()
        renamed[:, place] = number[b[:, place]]
    return layers, (a, renamed)


def _group_means(values: Floats, group: Ints) -> Floats:
    sums = np.zeros((int(group.max(initial=-1)) + 1, values.shape[1]))
    np.add.at(sums, group, values)
    return sums / np.bincount(group)[:, None]


def decompose_drift(tokens: Frame, routings: Mapping[str, Frame], **options: object) -> pl.DataFrame:
    """Did the router change, or what it reads? Drift with only one of the two exchanged: one row per layer and part.

    routings: "aa" and "bb" are the two checkpoints' own; "ab" the router of a on the hidden states of b, "ba" the
    reverse. Rows: part "both" (aa, bb), "router" (aa against ba: a's states, b's router), "input" (aa against ab), each
    with the columns, interval and null of `routing_drift`, whose options may be given. Experts keep their numbers. This
    project's.
    """
    pairs = {"both": ("aa", "bb"), "router": ("aa", "ba"), "input": ("aa", "ab")}
    missing = {name for pair in pairs.values() for name in pair} - routings.keys()
    if missing:
        raise FrameError(f"routings: expected aa, bb, ab and ba, got none for {', '.join(sorted(missing))}.")
    frames = [
        routing_drift(tokens, routings[one], routings[two], **options).with_columns(part=pl.lit(part))  # type: ignore[arg-type]
        for part, (one, two) in pairs.items()
    ]
    return pl.concat(frames).select("part", pl.all().exclude("part"))


def margin_flips(
    tokens: Frame,
    first: Frame,
    second: Frame,
    edges: Sequence[float] = MARGIN_EDGES,
    segments: Sequence[str] = CONTENT_SEGMENTS,
) -> pl.DataFrame:
    """How often two runs choose other experts, by how narrow the choice was in the first: one row per layer and bin.

    Columns layer, margin (lower edge of the bin, in logits), flips (share of tokens whose set of experts differs), low,
    high (95%, t over groups), n_tokens, n_groups. Numerical noise flips small margins only; flips at large ones
    are a different computation (bfloat16 runs differ by 0.1 to 0.6 logits, arXiv 2606.03780). Null: 0, the runs are the
    same. Tokens without a margin are left out.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).collect()
    layers, (a, b) = _aligned(kept, first, second, None)
    flips = (shared_experts(a, b) < a.shape[2]).astype(np.float64)  # [token layer]
    as_list = first.lazy().with_columns(
        margin=pl.concat_list(pl.col("router_margin").fill_nan(None).fill_null(-np.inf))
    )
    margins = token_array(kept, as_list, "margin")[1][..., 0]
    group = codes(kept["group_id"])
    rows = []
    for place, layer in enumerate(layers):
        bins = np.digitize(margins[:, place], edges) - 1
        for number in np.unique(bins[bins >= 0]):
            at = bins == number
            present, owner = np.unique(group[at], return_inverse=True)
            share = np.bincount(owner, flips[at, place]) / np.bincount(owner)
            low, high = t_interval(share)
            numbers = (float(share.mean()), float(low), float(high), int(at.sum()), len(present))
            rows.append((layer, float(edges[number]), *numbers))
    floats = dict.fromkeys(("margin", "flips", "low", "high"), pl.Float64)
    schema = {"layer": pl.Int64, **floats, "n_tokens": pl.Int64, "n_groups": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")
