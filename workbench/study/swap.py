"""The header swap: the same tokens again, with only the effort or the channel in the header changed.

What a model writes at high effort is other text than at low effort, and other text takes other experts. So the written
conversation is read again with another header: every later token is then paired with itself, and what routing differs
in is the header alone. The finished run gives the conversations; the swapped ones are a run of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from workbench.axes import CHANNELS, EFFORTS, SEGMENTS, TOKEN_COLUMNS
from workbench.capture import capture_routing, check_room, suitable_threads
from workbench.chat import label_tokens
from workbench.errors import RunError
from workbench.io.prompts import LANGS
from workbench.io.run_files import Labels
from workbench.io.runs import Run, RunWriter
from workbench.io.token_class import places
from workbench.io.tokens import Tokenizer
from workbench.models import Llama
from workbench.study.describe import describe_model, describe_sitting, tokenizer_of
from workbench.study.languages import contrast
from workbench.study.plan import fingerprint
from workbench.study.progress import Stopwatch, show_progress

SWAPS = {"effort": EFFORTS, "channel": ("analysis", "final")}


@dataclass(frozen=True)
class SwapPlan:
    """header: "effort" or "channel". reference: the effort whose conversations are taken; batch_size: of the passes."""

    header: str = "effort"
    reference: str = "medium"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.header not in SWAPS:
            raise RunError(f"header swap: expected effort or channel, got {self.header!r}. Pass one of them.")


def run_swap(model: Llama, run: Run, plan: SwapPlan | None = None, progress: bool = True) -> Run:
    """Read the conversations of a run again under every header; a run in run.path/swap-HEADER, resumable.

    Its tokens have the new header in the column `effort`, or for channels in `segment`. Raises RunError when the run
    has no such conversations, or when two headers do not have equally many tokens, so that tokens would not pair.
    """
    plan = plan or SwapPlan()
    tokenizer = tokenizer_of(model)
    frames = swap_documents(run.tokens.collect(), tokenizer, plan)
    check_room(model, [frame["token_id"].to_list() for frame in frames], 0)
    batches = [frames[start : start + plan.batch_size] for start in range(0, len(frames), plan.batch_size)]
    settings = {**run.manifest["settings"], "max_new_tokens": 0, "router_logits": True, "norms": False}
    identity = {
        "settings": settings | {"header_swap": plan.header, "reference": plan.reference},
        "model": describe_model(model, tokenizer),
        "prompts": {"rendered_hash": fingerprint([frame["token_id"].to_list() for frame in frames])},
    }
    watch = Stopwatch()
    out = run.path / f"swap-{plan.header}"
    with suitable_threads(model), RunWriter.open(out, identity, describe_sitting(model), len(batches)) as writer:
        for part in show_progress(writer.missing(), len(batches), progress):
            writer.write(part, *_measure(model, batches[part], watch))
        return writer.finish(watch.report())


def swap_documents(tokens: pl.DataFrame, tokenizer: Tokenizer, plan: SwapPlan) -> list[pl.DataFrame]:
    """A tokens frame per conversation and header; those of one conversation have equally many tokens, asserted."""
    words = {name: tokenizer.encode_literal(name) for name in SWAPS[plan.header]}
    if len({len(ids) for ids in words.values()}) > 1:
        counts = ", ".join(f"{name} {len(ids)}" for name, ids in words.items())
        raise RunError(f"header swap: expected headers of equally many tokens, got {counts}. Tokens would not pair.")
    kept = tokens.filter(pl.col("effort") == plan.reference).sort("doc_id", "pos")
    frames = []
    for (_,), document in kept.group_by("doc_id", maintain_order=True):
        place = _header_place(document, words, plan)
        if place is not None:
            frames += [_swapped(document, place, name, ids, tokenizer, plan) for name, ids in words.items()]
    if not frames:
        raise RunError(
            f"header swap: expected conversations at {plan.reference} effort with {plan.header} headers, got none. "
            "Run a thinking model with the harmony template."
        )
    return frames


def _header_place(document: pl.DataFrame, words: dict[str, list[int]], plan: SwapPlan) -> int | None:
    """Where the header's word stands: the effort in the system message, or the channel of the first answer message."""
    ids, segments = document["token_id"].to_list(), document["segment"].to_list()
    where = ("system",) if plan.header == "effort" else ("control",)
    wanted = [words[plan.reference]] if plan.header == "effort" else [words["analysis"]]
    for place in range(len(ids)):
        if segments[place] in where and any(ids[place : place + len(word)] == word for word in wanted):
            return place
    return None


def _swapped(
    document: pl.DataFrame, place: int, name: str, word: Sequence[int], tokenizer: Tokenizer, plan: SwapPlan
) -> pl.DataFrame:
    before = document["token_id"].to_list()
    ids = [*before[:place], *word, *before[place + len(word) :]]
    assert len(ids) == len(before)
    segments = pl.Series("segment", label_tokens(ids, tokenizer))
    return (
        document.drop("segment_index", "pos_in_segment")
        .with_columns(
            segments,
            doc_id=pl.format("{}-as-{}", "doc_id", pl.lit(name)),
            token_id=pl.Series(ids),
            token=pl.Series(tokenizer.to_str_tokens(ids)),
            phase=pl.lit("prefill"),
            effort=pl.lit(name) if plan.header == "effort" else pl.col("effort"),
        )
        .hstack(places(segments))
        .select(TOKEN_COLUMNS)
    )


def _measure(model: Llama, batch: Sequence[pl.DataFrame], watch: Stopwatch) -> tuple:
    with watch("capture"):
        routing = capture_routing(model, [frame["token_id"].to_list() for frame in batch], router_logits=True)
    tokens = pl.concat(batch)
    labels: Labels = {"lang": list(LANGS), "segment": list(SEGMENTS), "layer": list(routing.layers)}
    cells = [(LANGS.index(a), SEGMENTS.index(b)) for a, b in tokens.select("lang", "segment").rows()]
    frame = routing.frame(tokens["doc_id"].to_list(), tokens["pos"].to_list())
    return tokens, frame, routing.load(cells, (len(LANGS), len(SEGMENTS))), labels, routing.router_logits


def swapped_tokens(run: Run) -> tuple[pl.DataFrame, str, tuple[str, str]]:
    """What `languages.contrast` compares: (tokens of the swap, its axis, two conditions).

    For effort every content token, high against low; for channels the tokens of the message whose channel was swapped.
    """
    tokens = run.tokens.collect()
    if run.manifest["settings"]["header_swap"] == "effort":
        return tokens, "effort", ("high", "low")
    condition = pl.col("doc_id").str.extract("-as-([a-z]+)$")
    changed = tokens.with_columns(header=condition).filter(pl.col("segment").is_in(CHANNELS))
    first = changed.filter(pl.col("segment_index") == pl.col("segment_index").min().over("doc_id"))
    return first, "header", ("analysis", "final")


SWAP_SIDES = {"effort": ("high", "low"), "channel": ("analysis", "final")}


def swap_frames(run: Run) -> dict[str, pl.DataFrame]:
    """The contrasts of the header swaps that a run has, as swap_effort and swap_channel."""
    frames = {}
    for header in SWAP_SIDES:
        if (run.path / f"swap-{header}" / "manifest.json").exists():
            swapped = Run.open(run.path / f"swap-{header}")
            frames[f"swap_{header}"] = contrast(swapped, *swapped_tokens(swapped))
    return frames
