from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from workbench.errors import RunError
from workbench.io.prompts import Prompt
from workbench.io.runs import Run
from workbench.models import Llama
from workbench.stats.calibration import FLOORS
from workbench.study import Settings, run_study, write_report
from workbench.study.examples import N_GROUPS, choose_documents
from workbench.study.languages import flagged_places, language_facts, language_frames
from workbench.study.report import draw, summarise


class Page(HTMLParser):
    """Tags, attributes and texts of a page, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def explorer_data(text: str) -> dict[str, Any]:
    found = re.search(r'data-workbench-explorer="1">.*?<script type="application/json">(.*?)</script>', text, re.DOTALL)
    return json.loads(found.group(1))


@pytest.fixture(scope="module")
def page(finished_run: Run) -> str:
    return write_report(finished_run).read_text(encoding="utf-8")


def test_the_page_has_every_figure_and_stays_small(page: str) -> None:
    figures = re.findall(r'<div class="figure" data-figure="(\w+)"', page)
    assert figures == [
        "load_by_language",
        "load_by_segment",
        "balance",
        "divergence",
        "overlap",
        "forest",
        "contrast_map",
        "shared_forest",
        "shared_map",
        "bits",
        "persistence",
        "in_a_row",
        "layers",
        "entropy_by_language",
        "entropy_by_segment",
        "margin_by_language",
        "margin_by_segment",
    ]  # a random model writes no analysis, so there are no lengths
    assert len(page.encode()) < 8_000_000
    for name in figures:
        spec = json.loads(re.search(rf'id="figure-{name}">(.*?)</script>', page).group(1))
        assert spec["data"]


def test_the_page_asks_for_nothing_outside_itself(page: str) -> None:
    tags = Page(page).tags
    links = [attributes[name] for _, attributes in tags for name in ("src", "href") if name in attributes]
    assert links
    assert all(link.startswith("#") for link in links), "a page links to itself only"
    policy = next(attributes["content"] for name, attributes in tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert page.count("plotly.js v") == 1


def test_hostile_prompts_stay_text(page: str) -> None:
    parsed = Page(page)
    assert [name for name, _ in parsed.tags].count(
        "script"
    ) == 21  # seventeen figures, the explorer's data, plotly, our own, the explorer's
    assert "img" not in [name for name, _ in parsed.tags]
    assert "alert(1)</script>" not in page


def test_hostile_prompts_are_shown_as_they_are(
    small: Llama, prompts: list[Prompt], settings: Settings, tmp_path: Path
) -> None:
    hostile = [prompt for prompt in prompts if prompt.group_id == "hostile"]
    text = write_report(run_study(small, hostile, tmp_path, settings)).read_text(encoding="utf-8")
    shown = Page(text).text
    for prompt in hostile:
        assert prompt.text in shown  # in the explorer's fallback
    assert "alert(2)>" not in text.replace("alert(2)&gt;", "")


def test_the_explorer_holds_pairs_and_efforts_of_the_run(finished_run: Run, page: str) -> None:
    payload = explorer_data(page)
    assert payload["compare"]
    groups = {doc["group_id"] for doc in payload["docs"]}
    assert 1 <= len(groups) <= N_GROUPS
    heads = [(doc["group_id"], doc["lang"], doc["effort"]) for doc in payload["docs"]]
    assert sorted(heads) == sorted(
        (group, lang, effort) for group in groups for lang in ("ja", "en") for effort in ("low", "medium", "high")
    )
    assert [head[1:] for head in heads[:2]] == [("ja", "medium"), ("en", "medium")]
    tokens = finished_run.tokens.filter(pl.col("doc_id") == payload["docs"][0]["doc_id"]).sort("pos").collect()
    assert payload["docs"][0]["token_ids"] == tokens["token_id"].to_list()


def test_every_card_and_the_explorer_lead_to_each_other(page: str) -> None:
    tags = Page(page).tags
    cards = {attributes["id"] for _, attributes in tags if (attributes.get("id") or "").startswith("expert-")}
    assert cards == {f"expert-{layer}-{expert}" for layer in range(2) for expert in range(8)}
    links = [attributes for name, attributes in tags if name == "a" and "data-expert" in attributes]
    assert {f"expert-{link['data-layer']}-{link['data-expert']}" for link in links} == cards
    assert {link["href"] for link in links} == {"#explorer"}
    assert [name for name, attributes in tags if attributes.get("id") == "explorer"] == ["h2"]


def lengths(**groups: tuple[str, int]) -> pl.DataFrame:
    """Tokens of made-up groups, each of one topic and two documents of so many tokens."""
    rows = [
        {"doc_id": f"{group}-{lang}", "group_id": group, "lang": lang, "effort": None, "topic": topic, "pos": pos}
        for group, (topic, n) in groups.items()
        for lang in ("en", "ja")
        for pos in range(n)
    ]
    return pl.DataFrame(rows, schema_overrides={"effort": pl.String})


def test_documents_of_the_explorer_are_usual_ones_of_several_topics() -> None:
    tokens = lengths(a=("food", 9), b=("food", 10), c=("sea", 12), d=("sums", 40), e=("time", 11))
    assert choose_documents(tokens, 1000) == ["e-ja", "e-en", "b-ja", "b-en", "c-ja", "c-en"]
    assert choose_documents(tokens, 44) == ["e-ja", "e-en", "b-ja", "b-en"], "whole groups while they fit"
    assert choose_documents(tokens, 18) == ["a-ja", "a-en"], "the only one that is short enough"
    assert choose_documents(tokens, 10) == ["a-ja"], "no group fits: documents that do"
    assert choose_documents(tokens, 8) == []


def test_every_number_in_the_findings_is_that_of_the_frames(finished_run: Run, page: str) -> None:
    frames = summarise(finished_run, finished_run.tokens.collect())
    n_certain = (frames["contrasts"]["p_adjusted"] < 0.05).sum()
    n_above = (frames["divergence"]["excess_low"] > 0).sum()
    assert n_certain == 0
    assert "With 5 groups in both languages, no expert could be told apart at p &lt; 0.05" in page
    assert "These are 5 prompt groups: below 20, any interval is too narrow" in page
    assert f"different routes in {n_above} of 2 layers" in page
    assert "used more in" not in page.split("</ul>")[0]  # nothing significant, so no largest difference
    assert re.search(r"The token limit cut off \d+ of 30 answers", page)


def test_the_page_is_rebuilt_to_the_same_bytes(finished_run: Run, page: str) -> None:
    (finished_run.path / "report.html").unlink()
    assert write_report(finished_run.path).read_text(encoding="utf-8") == page


def test_statistics_leave_template_tokens_out(finished_run: Run) -> None:
    tokens = finished_run.tokens.collect()
    frames = summarise(finished_run, tokens)
    assert {"bos", "system", "developer", "control"}.isdisjoint(frames["load_by_segment"]["segment"])
    content = tokens.filter(pl.col("segment").is_in(["user", "plain", "analysis", "final", "commentary", "tool"]))
    assert frames["load_by_language"]["slots"].sum() == len(content) * 2 * 2
    assert set(draw(frames)) >= {"divergence", "forest"}


def test_plain_text_in_one_language_gives_a_smaller_page(small: Llama, prompts: list[Prompt], tmp_path: Path) -> None:
    english = [prompt for prompt in prompts if prompt.lang == "en"]
    text = write_report(run_study(small, english, tmp_path, Settings(template="plain", max_new_tokens=0))).read_text(
        encoding="utf-8"
    )
    assert "No prompt group is in both Japanese and English, so the languages are not compared" in text
    assert "5 texts in English from 5 prompt groups" in text
    assert "英語のプロンプトを与え" in text
    assert "日本語と英語のプロンプト" not in text
    assert "as the model saw them" in text
    assert {phase for doc in explorer_data(text)["docs"] for _, phase, _ in doc["runs"]} == {"prefill"}
    assert "one pass over each whole text" in text
    assert 'data-figure="divergence"' not in text
    assert "bare text after a BOS token and not answered" in text


def test_two_languages_without_a_pair_are_not_compared(
    small: Llama, prompts: list[Prompt], settings: Settings, tmp_path: Path
) -> None:
    unpaired = [prompt for place, prompt in enumerate(prompts) if place in (0, 3, 6, 9)]  # sum ja, tea en, ...
    run = run_study(small, unpaired, tmp_path, settings)
    assert flagged_places(run, run.tokens.collect()) == []
    text = write_report(run).read_text(encoding="utf-8")
    assert "No prompt group is in both Japanese and English, so the languages are not compared" in text
    assert "0 of 4 prompt groups are in both languages" in text
    assert "12 conversations in Japanese and English from 4 prompt groups" in text
    assert {'data-figure="divergence"', 'data-figure="forest"', 'data-figure="overlap"'}.isdisjoint(text.split())


def test_two_groups_give_a_page_that_says_so(
    small: Llama, prompts: list[Prompt], settings: Settings, tmp_path: Path
) -> None:
    for n_groups, name in ((1, "1 group"), (2, "2 groups")):
        run = run_study(small, prompts[: 2 * n_groups], tmp_path / name, settings)
        text = write_report(run).read_text(encoding="utf-8")
        assert f"With {name} in both languages, no divergence can be estimated." in text
        assert f" from {name.replace('group', 'prompt group')}," in text


def test_the_seed_is_kept_and_a_bad_one_refused(finished_run: Run, page: str, tmp_path: Path) -> None:
    path = shutil.copytree(finished_run.path, tmp_path / "run")
    other = write_report(path, seed=7).read_text(encoding="utf-8")
    assert other != page
    assert write_report(path).read_text(encoding="utf-8") == other
    assert write_report(path, seed=0).read_text(encoding="utf-8") == page
    with pytest.raises(RunError, match="seed: expected at least 0, got -1"):
        write_report(path, seed=-1)


def test_the_page_tells_no_path_of_this_machine(finished_run: Run, page: str, tmp_path: Path) -> None:
    path = shutil.copytree(finished_run.path, tmp_path / "run") / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"source": "small"', '"source": "/srv/models/small"'))
    assert Run.open(path.parent).manifest["sittings"][0]["source"] == "/srv/models/small"
    assert write_report(path.parent).read_text(encoding="utf-8") == page


def test_a_run_of_two_versions_of_the_software_says_so(finished_run: Run, page: str, tmp_path: Path) -> None:
    assert "under different software" not in page
    path = shutil.copytree(finished_run.path, tmp_path / "run") / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    (first,) = manifest["sittings"]
    manifest["sittings"] = [{**first, "versions": {**first["versions"], "torch": "2.0.0"}}, first]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    said = f"measured under different software (torch 2.0.0 and {first['versions']['torch']}): its parts may differ"
    assert said in write_report(path.parent).read_text(encoding="utf-8")


def test_the_lead_names_the_languages_and_what_was_done(page: str) -> None:
    assert "30 conversations in Japanese and English from 5 prompt groups" in page
    assert "日本語と英語のプロンプトを与え" in page
    assert "Answers were written by the model, greedily" in page
    assert "control tokens are scaffolding, not content, and are left out" in page


def test_no_run_no_page(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"manifest\.json"):
        write_report(tmp_path)


def test_a_run_without_router_logits_flags_nothing_by_half_of_a_pair_of_floors(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calibrated floor of the share is 0: alone it would call every significant expert a finding."""
    assert not finished_run.manifest["settings"]["router_logits"]
    monkeypatch.setitem(FLOORS, (8, 2), (0.0, 0.8))
    certain = pl.DataFrame({"layer": [0], "expert": [1], "risk_difference": [0.01], "p_adjusted": [0.001]})
    monkeypatch.setattr("workbench.study.languages.paired_contrasts", lambda *args, **options: certain)
    frames = language_frames(finished_run, finished_run.tokens.collect())
    assert not frames["contrasts"]["flagged"].any()
    assert not frames["shared"]["flagged"].any()
    assert "calibrated" not in frames  # so no sentence says "beyond the floors"
    assert "no router logits" in language_facts(finished_run, frames)["floors"]
