"""The explorer's data, its HTML and its errors; what it does in a browser is in test_explorer_browser.py."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from routed import HOSTILE, frames

import workbench
from workbench.errors import RunError, ShapeError
from workbench.io.runs import Run
from workbench.plots.explorer import Explorer, explore, explorer_script
from workbench.plots.explorer_data import MISSING, visible

TEXTS = {"tea-en-low": ["tea", " or", " coffee"], "tea-ja-low": ["お茶", "か", "珈琲", "か"], "sea-ja-low": ["海"] * 9}


def unpacked(payload: dict, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(expert ids, routing weights) [token layer k] and values [quantity token layer] of a document."""
    doc, k, n_layers = payload["docs"][place], payload["k"], len(payload["layers"])
    raw = {name: base64.b64decode(doc[name]) for name in ("ids", "weights", "values")}
    ids = np.frombuffer(raw["ids"], "u1" if payload["n_experts"] <= 256 else "<u2").reshape(-1, n_layers, k)
    weights = np.frombuffer(raw["weights"], "u1").reshape(ids.shape) * payload["weight_scale"] / 255
    return ids, weights, np.frombuffer(raw["values"], "<u2").reshape(-1, len(ids), n_layers)


@pytest.mark.parametrize("n_experts", [8, 256, 257, 1000])
def test_what_is_packed_is_what_the_frame_says(n_experts: int) -> None:
    tokens, routing = frames(TEXTS, n_experts=n_experts)
    shuffled = routing.sample(fraction=1, shuffle=True, seed=1)  # the order of rows carries no meaning
    payload = explore(tokens, shuffled, n_experts=n_experts, docs=["sea-ja-low", "tea-ja-low"]).payload
    assert [doc["doc_id"] for doc in payload["docs"]] == ["sea-ja-low", "tea-ja-low"]
    for place, doc in enumerate(payload["docs"]):
        ids, weights, values = unpacked(payload, place)
        for row in routing.filter(pl.col("doc_id") == doc["doc_id"]).iter_rows(named=True):
            at = (row["pos"], row["layer"])
            assert ids[at].tolist() == row["expert_ids"]
            np.testing.assert_allclose(weights[at], row["routing_weights"], atol=0.51 * payload["weight_scale"] / 255)
            for quantity, entry in zip(values, payload["quantities"], strict=True):
                value = entry["low"] + quantity[at] / (MISSING - 1) * (entry["high"] - entry["low"])
                assert value == pytest.approx(row[entry["name"]], abs=(entry["high"] - entry["low"]) / MISSING)


def test_missing_and_infinite_quantities_have_no_value() -> None:
    tokens, routing = frames({"tea-en": ["a", "b", "c", "d"]}, n_layers=1)
    routing = routing.with_columns(router_margin=pl.Series([None, float("inf"), float("nan"), 0.5]))
    payload = explore(tokens, routing, n_experts=8).payload
    assert unpacked(payload, 0)[2][1, :, 0].tolist() == [MISSING, MISSING, MISSING, 0]
    assert payload["quantities"][1]["high"] == 0.5


def test_layers_keep_their_numbers_and_segments_their_runs() -> None:
    tokens, routing = frames({"tea-en": ["a", "b", "c"]}, layers=[1, 3], n_written=1)
    payload = explore(tokens, routing, n_experts=8).payload
    assert payload["layers"] == [1, 3]
    assert payload["docs"][0]["runs"] == [("user", "prefill", 2), ("analysis", "decode", 1)]


def test_other_columns_are_tolerated_and_may_colour() -> None:
    tokens, routing = frames({"tea-en": ["a", "b"]})
    tokens = tokens.with_columns(script=pl.lit("latin"))
    routing = routing.with_columns(expert_norm=pl.col("pos") * 2.0).drop("router_margin")
    assert [q["name"] for q in explore(tokens, routing, n_experts=8).payload["quantities"]] == ["router_entropy"]
    chosen = explore(tokens.lazy(), routing.lazy(), n_experts=8, quantities=["expert_norm"]).payload["quantities"]
    assert chosen == [{"name": "expert_norm", "label": "expert norm", "unit": "", "low": 0.0, "high": 2.0}]


def test_a_run_opens_at_one_group_with_its_pair_first(finished_run: Run) -> None:
    explorer = workbench.explore(finished_run, compare=True)
    docs = explorer.payload["docs"]
    assert len(docs) == 6
    assert len({doc["group_id"] for doc in docs}) == 1
    assert [(doc["lang"], doc["effort"]) for doc in docs[:3]] == [("ja", "medium"), ("en", "medium"), ("ja", "low")]
    assert explorer.payload["compare"]
    assert repr(explorer).startswith("Explorer(6 documents, ")
    counted = finished_run.tokens.filter(pl.col("group_id") == docs[0]["group_id"]).select(pl.len()).collect().item()
    assert sum(len(doc["tokens"]) for doc in docs) == counted
    hostile = workbench.explore(finished_run, group="hostile").payload
    assert {doc["group_id"] for doc in hostile["docs"]} == {"hostile"}


class Fallback(HTMLParser):
    """What a viewer without scripts shows: tags, the text outside scripts and styles, and the tooltips."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.titles += [value or "" for name, value in attrs if name == "title"]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["script"], ["style"]):
            self.text += data


def test_hostile_tokens_stay_text() -> None:
    tokens, routing = frames({"tea-en": HOSTILE})
    explorer = explore(tokens, routing, n_experts=8)
    parsed = Fallback()
    parsed.feed(explorer.fragment())
    assert set(parsed.tags) == {"style", "div", "p", "em", "strong", "span", "script"}
    assert parsed.tags.count("script") == 1
    for text in HOSTILE:
        assert visible(text) in parsed.text
    data = re.search(r'<script type="application/json">(.*?)</script>', explorer.fragment(), re.DOTALL)
    assert data
    assert data[1].isascii()
    assert not set("<>&\u2028") & set(data[1])
    assert json.loads(data[1])["docs"][0]["tokens"] == [visible(text) for text in HOSTILE]


def test_hostile_ids_of_documents_stay_text() -> None:
    tokens, routing = (
        frame.with_columns(doc_id=pl.lit("\u202e<b>\x00")) for frame in frames({"tea-en": ["tea", " time"]})
    )
    explorer = explore(tokens, routing, n_experts=8)
    assert explorer.payload["docs"][0]["label"].endswith(" · ⟨U+202E⟩<b>⟨U+0000⟩")
    parsed = Fallback()
    parsed.feed(explorer.fragment())
    assert "b" not in parsed.tags


def test_characters_that_hide_or_reorder_text_are_shown_by_code() -> None:
    assert visible("a\u202eb\u200b\x00\ud800\n") == "a⟨U+202E⟩b⟨U+200B⟩⟨U+0000⟩⟨U+D800⟩↵\n"
    assert visible("日本 語ｶﾞ é 👍") == "日本 語ｶﾞ é 👍"


def test_without_scripts_every_token_tells_its_experts() -> None:
    tokens, routing = frames({"tea-en": ["tea", " time"]})
    parsed = Fallback()
    parsed.feed(explore(tokens, routing, n_experts=8)._repr_html_())
    strongest = [
        " ".join(str(ids[0]) for ids in routing.filter(pl.col("pos") == pos)["expert_ids"]) for pos in range(2)
    ]
    assert parsed.titles == [f"id {100 + pos}, user; layers 0 to 2: {strongest[pos]}" for pos in range(2)]
    assert "needs scripts" in parsed.text


def test_the_page_allows_its_own_script_alone(tmp_path: Path) -> None:
    tokens, routing = frames(TEXTS)
    path = explore(tokens, routing, n_experts=8).to_html(tmp_path / "explorer.html")
    page = path.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'; style-src" in page
    assert script == explorer_script()
    assert not re.search(r"https?://|//cdn|\bimport\(|\bfetch\(", page)
    with pytest.raises(RunError, match="expected a place to write"):
        explore(tokens, routing, n_experts=8).to_html(tmp_path / "none" / "explorer.html")


def test_size_is_what_the_docstring_says() -> None:
    tokens, routing = frames({"tea-en": ["token"] * 300}, n_layers=32, n_experts=128, k=8)
    fragments = [
        len(explore(tokens.head(n), routing.filter(pl.col("pos") < n), n_experts=128).fragment()) for n in (100, 300)
    ]
    assert (fragments[1] - fragments[0]) / 200 < 1300


def without(frame: pl.DataFrame, **last: object) -> pl.DataFrame:
    """The frame with values of its last row replaced."""
    changed = frame.tail(1).with_columns(**{name: pl.lit(pl.Series([value])) for name, value in last.items()})
    return pl.concat([frame.head(-1), changed.cast(frame.schema)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, r: (t, r.head(-1)), ShapeError, "expected one row for each of 3 tokens in each of 3 layers"),
        (lambda t, r: (t, pl.concat([r, r.tail(1)])), ShapeError, "got 10 rows that are not those"),
        (lambda t, r: (t, without(r, expert_ids=[3, 8])), ShapeError, "expected 0 to 7, got \\d to 8"),
        (lambda t, r: (t, without(r, expert_ids=[-1, 0])), ShapeError, "expected 0 to 7, got -1 to"),
        (lambda t, r: (t, without(r, expert_ids=[1])), ShapeError, "expected lists of one length"),
        (lambda t, r: (t, without(r, routing_weights=[1.5, -0.5])), ShapeError, "finite numbers of at least 0"),
        (lambda t, r: (t, without(r, routing_weights=[0.5, float("nan")])), ShapeError, "finite numbers"),
        (lambda t, r: (t.drop("token"), r), RunError, "tokens: expected a column 'token'"),
        (lambda t, r: (t, r.drop("expert_ids")), RunError, "routing: expected a column 'expert_ids'"),
    ],
)  # fmt: skip
def test_frames_that_do_not_fit_are_refused(change, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        explore(*change(*frames({"tea-en": ["a", "b", "c"]})), n_experts=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"docs": ["nothing"]}, "expected ids of documents of the run, got \\['nothing'\\]"),
        ({"docs": []}, "got none"),
        ({"group": "nothing"}, "expected a group of the run, got 'nothing'"),
        ({"group": "tea", "docs": ["tea-en-low"]}, "expected one of them"),
        ({"group": "tea", "max_tokens": 5}, "expected at most 5 tokens in one explorer, got 7"),
        ({"max_tokens": 5}, "expected a prompt group of at most 5 tokens"),
        ({"n_experts": None}, "n_experts: expected 1 to 65536 beside frames, got None"),
        ({"quantities": ["nothing"]}, "expected a column 'nothing'"),
    ],
)
def test_choices_that_cannot_be_met_are_refused(arguments: dict, message: str) -> None:
    tokens, routing = frames(TEXTS)
    with pytest.raises(RunError, match=message):
        explore(tokens, routing, **{"n_experts": 8, **arguments})


def test_what_is_no_run_is_refused() -> None:
    with pytest.raises(RunError, match="expected a run or two frames, got str"):
        explore("runs/demo")
    with pytest.raises(RunError, match="expected polars frames, got DataFrame, list"):
        explore(frames(TEXTS)[0], [1], n_experts=8)


def test_the_widget_shares_payload_and_selection() -> None:
    pytest.importorskip("anywidget")
    explorer = explore(*frames(TEXTS), n_experts=8)
    widget = explorer.widget()
    assert widget.payload == explorer.payload
    assert widget.selection == {"doc_id": None, "pos": None, "layer": None, "expert": None}
    assert "export default" in widget._esm
    assert {"payload", "selection"} <= set(widget.keys)  # these travel between page and Python


def test_the_widget_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.plots import explorer_widget

    explorer_widget._widget_class.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(RunError, match="Install the extra `notebooks`"):
        Explorer({"docs": []}).widget()
    explorer_widget._widget_class.cache_clear()
