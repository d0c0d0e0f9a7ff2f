"""Sentences from hand-made frames."""

from __future__ import annotations

import polars as pl

from workbench.study.findings import _contrasts, _divergence, _few_groups, _shared, findings
from workbench.study.wording import counted


def contrasts(p_largest: float, p_next: float, n_groups: int = 30) -> pl.DataFrame:
    """Two experts; the one with the larger difference comes first."""
    return pl.DataFrame(
        {
            "layer": [3, 1],
            "expert": [5, 2],
            "f_ja": [0.5, 0.1],
            "f_en": [0.2, 0.3],
            "risk_difference": [0.3, -0.2],
            "p_adjusted": [p_largest, p_next],
            "n_groups": [n_groups, n_groups],
        }
    )


def lines(p_largest: float, p_next: float, answers: dict[str, list[int]], stop_ids: list[int]) -> list[str]:
    rows = [
        {"doc_id": doc, "pos": pos, "token_id": token, "phase": "decode"}
        for doc, ids in answers.items()
        for pos, token in enumerate(ids)
    ]
    measures = {"measure": ["effective_experts", "n_idle"], "value": [1.5, 1.0], "low": [1.4, 1.0], "high": [1.6, 1.0]}
    balance = pl.DataFrame(measures).with_columns(lang=pl.lit("ja"), layer=pl.lit(0))
    frames = {"contrasts": contrasts(p_largest, p_next), "balance": balance, "preferences": pl.DataFrame()}
    return findings(pl.DataFrame(rows), frames, stop_ids)


def test_only_a_significant_difference_is_named_the_largest() -> None:
    assert lines(0.5, 0.4, {"a": [2]}, [2])[1].startswith(
        "None of 2 experts is used significantly differently (p < 0.05"
    )
    sentence = lines(0.5, 0.01, {"a": [2]}, [2])[1]
    assert sentence.startswith("1 of 2 experts is used differently")
    assert "layer 1, expert 2, used more in English: on average over prompt groups by 10.0% of a group's" in sentence
    assert "layer 3, expert 5, used more in Japanese" in lines(0.01, 0.01, {"a": [2]}, [2])[1]


def test_few_groups_are_said_to_be_few() -> None:
    assert "no expert could be told apart" in _contrasts({"contrasts": contrasts(0.06, 0.5, n_groups=5)})[0]
    assert _contrasts({"contrasts": contrasts(0.06, 0.5, n_groups=6)})[0].startswith("None of 2 experts")
    (line,) = _few_groups({"contrasts": contrasts(1, 1, n_groups=19)})
    assert "19 prompt groups: below 20" in line
    assert _few_groups({"contrasts": contrasts(1, 1, n_groups=20)}) == []
    (alone,) = _few_groups({"balance": pl.DataFrame({"n_units": [3, 3]})})  # one language
    assert alone.startswith("These are 3 prompt groups: below 20")


def test_shared_words_in_few_groups_claim_nothing_that_these_cannot_show() -> None:
    frames = {
        "matching": pl.DataFrame({"share": [0.1, 0.2]}),
        "calibrated": pl.DataFrame({"risk_floor": [0.0], "logit_floor": [0.8]}),
    }
    frame = contrasts(1, 1, n_groups=4).with_columns(flagged=pl.lit(False), low=pl.lit(-0.01), high=pl.lit(0.01))
    few = _shared(frames | {"shared": frame})
    assert few[1:] == ["With 4 groups that share words no expert could be told apart at p < 0.05."]
    assert len(_shared(frames | {"shared": frame.with_columns(n_groups=8)})) == 1  # nor that any are used alike
    never = frame.with_columns(n_groups=30, f_ja=pl.Series([0.0, 0.1]), f_en=pl.Series([0.0, 0.3]))
    assert _shared(frames | {"shared": never})[1].startswith("1 of 2 experts are used alike")  # one is not used at all


def test_only_a_layer_above_the_floor_is_named_the_largest() -> None:
    frame = pl.DataFrame({"layer": [0, 1], "between": [0.4, 0.2], "floor": [0.1, 0.1], "excess": [0.3, 0.1],
                          "excess_low": [-0.1, 0.05], "excess_high": [0.7, 0.15], "n_groups": [9, 9]})  # fmt: skip
    (sentence,) = _divergence({"divergence": frame})
    assert "in 1 of 2 layers" in sentence
    assert "largest in layer 1: 0.200 bits" in sentence
    (sentence,) = _divergence({"divergence": frame.head(1)})
    assert "in 0 of 1 layer, judged" in sentence
    assert "largest" not in sentence


def test_an_answer_is_cut_off_unless_its_last_token_stops_this_model() -> None:
    answers = {"a": [7, 2], "b": [7, 13], "c": [7, 7]}
    assert lines(1, 1, answers, [2, 13])[-1] == "The token limit cut off 1 of 3 answers."
    assert lines(1, 1, answers, [7])[-1] == "The token limit cut off 2 of 3 answers."
    assert not lines(1, 1, {"a": [7, 2]}, [2])[-1].startswith("The token limit")


def test_one_is_singular() -> None:
    assert [counted(n, "layer") for n in (0, 1, 1024)] == ["0 layers", "1 layer", "1,024 layers"]
    assert "In 1 case an expert got no content token" in lines(1, 1, {"a": [2]}, [2])[-1]
