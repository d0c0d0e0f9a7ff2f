"""What the study measures about experts, and the header swap, on a small random model."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
import pytest
import torch

from workbench.errors import RunError
from workbench.io.runs import Run
from workbench.models import Llama, build_model, init_weights
from workbench.plots.theme import NAMES
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.study import write_report
from workbench.study.atlas import atlas_cards, contexts
from workbench.study.compare import compare_models
from workbench.study.experts import expert_writes, measure_experts, read_experts, sample_documents
from workbench.study.report import summarise
from workbench.study.swap import SwapPlan, run_swap, swap_documents, swapped_tokens


@pytest.fixture(scope="module")
def run(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(shutil.copytree(finished_run.path, tmp_path_factory.mktemp("experts") / "run"))


@pytest.fixture(scope="module")
def measured(small: Llama, run: Run) -> dict[str, pl.DataFrame]:
    return measure_experts(small, run, progress=False)


def test_every_expert_is_measured_once(small: Llama, run: Run, measured: dict[str, pl.DataFrame]) -> None:
    for name in ("writes", "removal", "peaks"):
        assert measured[name].select("layer", "expert").n_unique() == 2 * 8
    assert measured["audit"].is_empty()  # no floors for this shape, so nothing is flagged
    files = {file: file.stat().st_mtime_ns for file in (run.path / "experts").iterdir()}
    again = measure_experts(small, run, progress=False)
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert all(again[name].equals(table, null_equal=True) for name, table in read_experts(run).items())


def test_what_an_expert_writes_is_its_mean_output_through_the_unembedding(small: Llama, run: Run) -> None:
    tokens = sample_documents(run, 2)
    found = expert_writes(small, small.tokenizer, tokens, batch_size=3)
    layer, expert = 1, int(found.filter(pl.col("n_slots") > 0, layer=1)["expert"][0])
    total, n = torch.zeros(small.cfg.d_model), 0
    for ids in tokens.group_by("doc_id", maintain_order=True).agg("token_id")["token_id"].to_list():
        with torch.inference_mode():
            _, cache = small.run_with_cache(
                torch.tensor([ids]), names_filter=lambda name: name.startswith(f"blocks.{layer}.mlp.hook_")
            )
        slots = cache["expert_ids", layer][0] == expert
        weighted = cache["expert_out", layer][0] * cache["routing_weights", layer][0][..., None]
        total, n = total + weighted[slots].sum(0), n + int(slots.sum())
    row = found.filter(layer=layer, expert=expert).row(0, named=True)
    assert row["n_slots"] == n
    logits = (small.unembed.weight * small.ln_final.weight) @ (total / n)
    best = logits[: small.tokenizer.d_vocab].argsort(descending=True)[:8].tolist()
    assert row["raises"] == small.tokenizer.to_str_tokens(best)


def test_what_an_expert_adds_is_the_mean_norm_of_its_weighted_output(
    small: Llama, run: Run, measured: dict[str, pl.DataFrame]
) -> None:
    tokens, norms = sample_documents(run), []
    for (_, segments), ids in zip(
        tokens.group_by("doc_id", maintain_order=True).agg("segment").rows(),
        tokens.group_by("doc_id", maintain_order=True).agg("token_id")["token_id"].to_list(),
        strict=True,
    ):
        with torch.inference_mode():
            _, cache = small.run_with_cache(torch.tensor([ids]), names_filter=lambda name: "blocks.1.mlp" in name)
        added = (cache["expert_out", 1][0] * cache["routing_weights", 1][0][..., None]).norm(dim=-1)
        content = torch.tensor([segment in CONTENT_SEGMENTS for segment in segments])
        norms += added[content][cache["expert_ids", 1][0][content] == 2].tolist()
    row = measured["contribution"].filter(layer=1, expert=2).row(0, named=True)
    assert row["n_slots"] == len(norms)
    assert row["reap"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    assert measured["geometry"]["n_docs"].unique().to_list() == [tokens["doc_id"].n_unique()]


def test_the_sample_is_whole_conversations_in_both_languages(run: Run) -> None:
    sample = sample_documents(run, 3)
    assert sample["group_id"].n_unique() == 3
    assert set(sample["effort"]) == {"medium"}
    assert sample.group_by("group_id").agg(pl.col("lang").n_unique())["lang"].to_list() == [2] * 3
    assert sample.equals(run.tokens.collect().join(sample.select("doc_id").unique(), on="doc_id").sort("doc_id", "pos"))


def test_a_card_says_what_the_frames_say(run: Run, measured: dict[str, pl.DataFrame]) -> None:
    frames = summarise(run, run.tokens.collect())
    cards = atlas_cards(frames)
    assert [(card.layer, card.expert) for card in cards] == [(layer, e) for layer in range(2) for e in range(8)]
    card = cards[3]
    text = {fact.name: fact.text for fact in card.facts}
    kl = frames["removal"].filter(layer=0, expert=3)["kl"][0]
    assert text["removed"].startswith(f"KL {kl:.4f} [")
    load = frames["load"].filter(layer=0, expert=3, lang="ja").row(0, named=True)
    assert f"{NAMES['ja']} {load['load']:.1%} [{load['low']:.1%}, {load['high']:.1%}] of slots" in text["load"]
    assert load["load"] == frames["load_by_language"].filter(layer=0, expert=3, lang="ja")["load"][0]
    reap = frames["contribution"].filter(layer=0, expert=3)["reap"][0]
    assert text["adds"].startswith(f"|g E(x)| {reap:.2f} [")
    assert text["prefers"].startswith("not judged: no calibrated floors for this run (JA - EN ")
    assert not card.flagged


def test_where_cards_are_few_the_flagged_come_before_the_most_used(
    run: Run, measured: dict[str, pl.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = summarise(run, run.tokens.collect())
    load = frames["load_by_language"].group_by("layer", "expert").agg(pl.col("slots").sum()).sort("slots")
    least, most = load.select("layer", "expert").row(0), load.select("layer", "expert").row(-1)
    is_least = (pl.col("layer") == least[0]) & (pl.col("expert") == least[1])
    name = "shared" if "shared" in frames else "contrasts"
    frames[name] = frames[name].with_columns(flagged=is_least)
    monkeypatch.setattr("workbench.study.atlas.MAX_CARDS", 2)
    assert {(card.layer, card.expert) for card in atlas_cards(frames)} == {least, most}


def test_contexts_are_in_the_texts_around_the_token(run: Run) -> None:
    tokens = run.tokens.collect()
    texts = ["".join(part) for part in tokens.group_by("doc_id", maintain_order=True).agg("token")["token"].to_list()]
    found = contexts(run, tokens)
    assert found.group_by("layer", "expert").len()["len"].max() <= 3
    for before, token, after in found.select("before", "token", "after").rows():
        assert any(before + token + after in text for text in texts)


def test_the_page_shows_the_atlas_and_the_tables_lie_beside_it(run: Run, measured: dict[str, pl.DataFrame]) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count('<div class="card"') == 16
    assert "Atlas of experts" in page
    assert "of 5 prompt groups are in both languages" in page
    tables = {file.stem for file in (run.path / "tables").glob("*.parquet")}
    assert {"shared", "contrasts", "removal", "writes", "bits", "divergence"} <= tables
    assert tables == {file.stem for file in (run.path / "tables").glob("*.csv")}
    assert pl.read_csv(run.path / "tables" / "removal.csv").height == 16


@pytest.mark.parametrize("header", ["effort", "channel"])
def test_a_swap_changes_the_header_and_nothing_else(run: Run, small: Llama, header: str) -> None:
    tokens = run.tokens.collect()
    if header == "channel":  # a random model writes no analysis: give each conversation one
        tokens = _with_analysis(tokens, small)
    frames = swap_documents(tokens, small.tokenizer, SwapPlan(header))
    by_document: dict[str, list[list[int]]] = {}
    for frame in frames:
        by_document.setdefault(frame["doc_id"][0].rpartition("-as-")[0], []).append(frame["token_id"].to_list())
    assert len(by_document) == 10  # conversations at medium effort
    for versions in by_document.values():
        assert len({len(ids) for ids in versions}) == 1
        changed = [place for place, ids in enumerate(zip(*versions, strict=True)) if len(set(ids)) > 1]
        assert len(changed) == 1


def _with_analysis(tokens: pl.DataFrame, small: Llama) -> pl.DataFrame:
    from workbench.chat import label_tokens
    from workbench.io.token_class import places

    special, word = small.tokenizer.special_ids, small.tokenizer.encode_literal("analysis")
    header = [special["<|channel|>"], *word, special["<|message|>"]]
    parts = []
    for (doc,), part in tokens.sort("doc_id", "pos").group_by("doc_id", maintain_order=True):
        prompt = part.filter(pl.col("phase") == "prefill")
        ids = prompt["token_id"].to_list() + header + [400, 401, 402]
        rows = pl.DataFrame({"token_id": ids, "token": small.tokenizer.to_str_tokens(ids), "pos": range(len(ids))})
        labels = prompt.select("group_id", "split", "topic", "lang", "script", "effort").head(1)
        rows = rows.join(labels, how="cross").with_columns(
            doc_id=pl.lit(doc), segment=pl.Series(label_tokens(ids, small.tokenizer)), phase=pl.lit("prefill"),
            token_class=pl.lit("mixed"), word_initial=pl.lit(True),
        )  # fmt: skip
        parts.append(rows.hstack(places(rows["segment"])).select(tokens.columns))
    return pl.concat(parts)


def test_a_swap_is_a_run_of_its_own_and_on_the_page(small: Llama, run: Run) -> None:
    swapped = run_swap(small, run, SwapPlan("effort", batch_size=4))
    assert swapped.manifest["settings"]["header_swap"] == "effort"
    tokens, axis, values = swapped_tokens(swapped)
    assert (axis, values) == ("effort", ("high", "low"))
    content = tokens.filter(pl.col("segment") != "system")
    assert content.group_by("group_id", "lang", "pos").agg(pl.col("token_id").n_unique())["token_id"].max() == 1
    before = (swapped.path / "tokens.parquet").stat().st_mtime_ns
    run_swap(small, run, SwapPlan("effort", batch_size=4))
    assert (swapped.path / "tokens.parquet").stat().st_mtime_ns == before
    page = write_report(run).read_text(encoding="utf-8")
    assert 'data-figure="swap_effort"' in page
    assert "The header alone" in page


def test_swaps_that_cannot_pair_are_refused(small: Llama, run: Run) -> None:
    tokens = run.tokens.collect()
    with pytest.raises(RunError, match="header swap: expected effort or channel, got 'date'"):
        SwapPlan("date")
    with pytest.raises(RunError, match="expected conversations at high effort with channel headers, got none"):
        swap_documents(tokens, small.tokenizer, SwapPlan("channel", reference="high"))

    class Uneven:
        def encode_literal(self, text: str) -> list[int]:
            return [1, 2] if text == "high" else [1]

    with pytest.raises(RunError, match="expected headers of equally many tokens, got low 1, medium 1, high 2"):
        swap_documents(tokens, Uneven(), SwapPlan("effort"))


def test_a_checkpoint_against_itself_and_against_another(small: Llama, run: Run, tmp_path: Path) -> None:
    own = compare_models(small, small, run)
    assert own["drift"]["overlap"].to_list() == [1.0, 1.0]
    assert own["routers"]["same"].to_list() == [1.0, 1.0]
    other = init_weights(build_model(small.cfg), seed=9, std=0.2)
    other.tokenizer, other.source = small.tokenizer, "other"
    drift = compare_models(small, other, run)["drift"]
    assert (drift["overlap"] < 0.8).all()
    page = write_report(run).read_text(encoding="utf-8")
    assert "The same tokens read by other" in page
    assert 'data-figure="drift"' in page


def test_checkpoints_of_other_shapes_are_not_compared(small: Llama, run: Run, moe: Llama) -> None:
    moe.tokenizer, moe.source = small.tokenizer, "moe"
    small_vocabulary = moe.cfg.d_vocab < small.tokenizer.d_vocab
    assert small_vocabulary
    with pytest.raises((RunError, ValueError), match="expected"):
        compare_models(small, moe, run)


def test_a_table_of_an_earlier_version_is_named(run: Run, measured: dict[str, pl.DataFrame]) -> None:
    file = run.path / "experts" / "geometry.parquet"
    whole = file.read_bytes()
    measured["geometry"].drop("gap_low", "n_units").write_parquet(file)
    with pytest.raises(RunError, match=r"geometry\.parquet: expected columns gap_low, n_units, got a table without"):
        read_experts(run)
    file.write_bytes(whole)
    assert read_experts(run)["geometry"].equals(measured["geometry"], null_equal=True)
