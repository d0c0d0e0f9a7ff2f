"""The measures of the page beyond the contrast of languages: from a run, and from hand-made frames."""

from __future__ import annotations

import polars as pl
import pytest

from workbench.io.runs import Run
from workbench.plots.experts import preference_bars
from workbench.stats.coactivation import coactivation
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.stats.specialisation import specialisation
from workbench.study import measures
from workbench.study.atlas import companions
from workbench.study.methods import methods
from workbench.study.remarks import remarks
from workbench.study.report import summarise


@pytest.fixture(scope="module")
def tokens(finished_run: Run) -> pl.DataFrame:
    return finished_run.tokens.collect()


@pytest.fixture(scope="module")
def frames(finished_run: Run, tokens: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return measures.measure_frames(finished_run, tokens)


def test_preferences_are_those_of_every_axis_with_two_values(
    finished_run: Run, tokens: pl.DataFrame, frames: dict[str, pl.DataFrame]
) -> None:
    found = frames["preferences"]
    content = tokens.filter(pl.col("segment").is_in(CONTENT_SEGMENTS))
    varied = [axis for axis in measures.AXES[:-1] if content[axis].drop_nulls().n_unique() > 1]
    assert found["axis"].unique(maintain_order=True).to_list() == [*varied, "position_bin"]
    alone = specialisation(tokens, finished_run.routing, "token_class", finished_run.n_experts, seed=finished_run.seed)
    here = found.filter(axis="token_class").drop("axis")
    assert here.equals(alone.select(here.columns), null_equal=True)


def preference(difference: float, p: float, axis: str = "topic", expert: int = 0) -> dict[str, object]:
    return {"axis": axis, "value": "x", "layer": 0, "expert": expert, "difference": difference, "p_adjusted": p}


def test_a_clear_preference_is_certain_and_large_either_way() -> None:
    rows = [
        preference(0.2, 0.01, expert=1),
        preference(-0.3, 0.05, "lang", expert=2),
        preference(0.9, 0.06, expert=3),
        preference(0.09, 0.001, expert=4),
        preference(0.5, float("nan"), expert=5),
    ]
    found = measures.clear_preferences(pl.DataFrame(rows))
    assert found["expert"].to_list() == [2, 1]
    bars = {trace.name: list(trace.y) for trace in preference_bars(found).data}
    assert bars == {"language": [1], "topic": [1]}
    assert measures.clear_preferences(pl.DataFrame()).is_empty()


def test_what_the_model_wrote_is_compared_over_equal_lengths(
    finished_run: Run, tokens: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[str, str], pl.DataFrame] = {}
    monkeypatch.setattr(measures, "contrast", lambda run, part, axis, sides: seen.setdefault(sides, part))
    written = tokens.filter(pl.col("phase") == "decode")
    channels = pl.when(pl.col("pos_in_segment") % 3 == 0).then(pl.lit("final")).otherwise(pl.lit("analysis"))
    pretended = tokens.with_columns(segment=pl.when(pl.col("phase") == "decode").then(channels).otherwise("segment"))
    found = measures.free_frames(finished_run, pretended)
    assert set(found) == {"free_effort", "free_channel"}
    effort, channel = seen["high", "low"], seen["analysis", "final"]
    for part, unit in ((effort, ["group_id", "lang"]), (channel, ["doc_id"])):
        sizes = part.group_by(*unit, "side").len()
        assert sizes.group_by(unit).agg(pl.col("len").n_unique())["len"].unique().to_list() == [1]
        assert set(part["phase"]) == {"decode"}
    assert set(effort["segment"]) == {"analysis"}
    assert len(channel) < len(written)
    assert not set(measures.free_frames(finished_run, tokens.filter(pl.col("phase") == "prefill")))


def test_pairs_rest_on_whole_groups_of_about_as_many_tokens_as_asked_for(tokens: pl.DataFrame) -> None:
    assert measures.some_groups(tokens).equals(tokens)
    content = tokens.filter(pl.col("segment").is_in(CONTENT_SEGMENTS))
    few = measures.some_groups(tokens, len(content) // 2)
    assert 1 <= few["group_id"].n_unique() < tokens["group_id"].n_unique()
    whole = tokens.filter(pl.col("group_id").is_in(few["group_id"].unique().to_list()))
    assert few.equals(whole)


def test_companions_are_listed_for_both_ends() -> None:
    routing = pl.DataFrame(
        {
            "doc_id": ["a"] * 60 + ["b"] * 60,
            "pos": [*range(60), *range(60)],
            "layer": 0,
            "expert_ids": [[0, 1] if pos % 2 else [2 + pos // 2 % 5, 7 - pos // 2 % 3] for pos in range(60)] * 2,
        }
    ).with_columns(pl.col("expert_ids").cast(pl.List(pl.Int64)))
    tokens = routing.select("doc_id", "pos").with_columns(segment=pl.lit("user"), group_id="doc_id")
    valid = routing.filter(pl.col("expert_ids").list.n_unique() == 2)
    kept = tokens.join(valid, on=["doc_id", "pos"], how="semi")
    pairs = coactivation(kept, valid, 8, n_draws=39)
    both = companions(pairs).filter(pl.col("expert").is_in([0, 1]))
    assert both.select("expert", "other").rows() in ([(0, 1), (1, 0)], [(1, 0), (0, 1)])


def test_remarks_and_methods_say_what_the_frames_hold(finished_run: Run, tokens: pl.DataFrame) -> None:
    frames = summarise(finished_run, tokens)
    said = remarks(frames)
    ratio = frames["fertility"]["ratio"].item()
    assert f"makes {ratio:.2f} [" in said["fertility"]
    assert said["again"].startswith(f"Two random halves of the {frames['reliability']['n_groups'][0]} groups")
    assert f"of {len(frames['pairs']):,} pairs of experts" in said["companions"]
    assert said["geometry"] == ""  # needs the model
    assert f"of {len(frames['steps']):,} pairs of an expert and one of the next layer" in said["steps"]
    words = frames["vocabulary"].filter(pl.col("n_types") > 0).sort("excess").row(-1, named=True)
    assert (
        f"sends {words['specialisation']:.0%} of its tokens to one first expert in layer {words['layer']}"
        in said["vocabulary"]
    )
    lines = methods(tokens, frames)
    assert any(line.startswith("Pairs of experts: ") and f"{len(frames['pairs']):,} tests" in line for line in lines)
    tests = frames["preferences"].filter(axis="token_class")["n_tests"][0]
    assert any(line.startswith("Preferences by kind of token") and f"{tests:,} tests" in line for line in lines)
    share = frames["matching"].filter(lang="ja").row(0, named=True)
    assert share["n_tokens"] == tokens.filter(pl.col("segment").is_in(CONTENT_SEGMENTS), lang="ja").height
