from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.compositions import activation_entropy, clr_contrasts, log_odds_contrasts
from workbench.stats.load import slot_counts

BY, LANGS = ["group_id", "lang"], ("ja", "en")


def counts_of(rates: dict[str, list[float]], n_units: int = 30, n_tokens: int = 40, seed: int = 0) -> pl.DataFrame:
    """Units that use expert e in a share of tokens drawn around rates[value][e]; experts are independent here."""
    rng = np.random.default_rng(seed)
    rows = []
    for group in range(n_units):
        for value, per_expert in rates.items():
            taste = np.clip(np.array(per_expert) * rng.uniform(0.6, 1.4, len(per_expert)), 0, 1)
            for expert, slots in enumerate(rng.binomial(n_tokens, taste)):
                rows += [(f"{group:03}", value, 0, expert, int(slots), n_tokens)] * bool(slots)
    return pl.DataFrame(rows, schema=["group_id", "lang", "layer", "expert", "slots", "n_tokens"], orient="row")


def null_counts(seed: int, n_values: int = 2) -> pl.DataFrame:
    names = [f"l{value}" for value in range(n_values)]
    return counts_of({name: [0.3, 0.2, 0.1, 0.05, 0.02, 0.3, 0.1, 0.05] for name in names}, 24, seed=seed)


def test_log_odds_by_hand() -> None:
    counts = pl.DataFrame(
        [("a", "ja", 3), ("a", "en", 1), ("b", "ja", 2), ("b", "en", 2)],
        schema=["group_id", "lang", "slots"], orient="row",
    ).with_columns(layer=pl.lit(0), expert=pl.lit(0), n_tokens=pl.lit(10))  # fmt: skip
    row = log_odds_contrasts(counts, "lang", LANGS, 1, prior=10, n_resamples=99).row(0, named=True)
    a, n = 10 * 0.2, 20  # the prior: ten tokens, of which both conditions' mean frequency uses the expert
    ja, en = 20 * 0.25 + a, 20 * 0.15 + a
    assert row["log_odds"] == pytest.approx(np.log(ja / (n + 10 - ja)) - np.log(en / (n + 10 - en)))
    # of the four ways to exchange, two leave the difference of unit a as it is, and two turn it round: one spread
    assert abs(row["z"]) == pytest.approx(1, abs=0.05)
    assert (row["n_units"], row["n_tokens"], row["n_tests"]) == (2, 40, 1)


@pytest.mark.parametrize("measure", [log_odds_contrasts, clr_contrasts])
def test_a_rare_expert_of_one_language_is_found_and_no_other(measure) -> None:
    counts = counts_of({"ja": [0.3] * 15 + [0.06], "en": [0.3] * 15 + [0.01]})
    found = measure(counts, "lang", LANGS, 16, n_resamples=999)
    first = found.row(0, named=True)
    assert first["expert"] == 15
    assert first["p_adjusted"] <= 0.005
    assert first["low"] > 0.3
    assert found["p_adjusted"][1:].min() > 0.05


def test_the_centred_log_ratio_is_free_of_the_closure(words) -> None:
    """One expert of Japanese; the others lose to it alike, which a log-ratio to the typical expert does not count."""
    tokens, routing, _ = words(context=3.0)
    counts = slot_counts(tokens, routing, BY)
    found = clr_contrasts(counts, "lang", LANGS, 16, n_resamples=499)
    assert found["expert"][0] == 0
    assert found["clr_difference"].sum() == pytest.approx(0, abs=1e-9)
    assert abs(found["clr_difference"].median()) < 0.2 < found["clr_difference"][0]


def test_nothing_is_found_where_there_is_nothing_and_intervals_hold() -> None:
    values, n_trials = ("l0", "l1"), 40
    errors, held = np.zeros(2), np.zeros(2)
    for seed in range(n_trials):
        counts = null_counts(seed)
        for place, measure in enumerate((log_odds_contrasts, clr_contrasts)):
            found = measure(counts, "lang", values, 8, n_resamples=199, seed=1000 + seed)
            errors[place] += found["p_adjusted"].min() <= 0.05
            held[place] += ((found["low"] <= 0) & (found["high"] >= 0)).mean()
    assert (errors / n_trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_trials)).all()
    assert (held / n_trials > 0.92).all()
    assert (held / n_trials < 0.985).all()


def test_the_entropy_tells_one_conditions_expert_from_everyones() -> None:
    langs = ("ja", "en", "zh", "ko")
    rates = {lang: [0.3, 0.02 + 0.3 * (lang == "ja"), 0.2 * (lang in ("ja", "zh")) + 0.02, 0.0] for lang in langs}
    found = activation_entropy(counts_of(rates), "lang", langs, 4, n_resamples=299)
    assert found["expert"].to_list() == [1, 2, 0, 3]
    one, two, all_, idle = found.iter_rows(named=True)
    assert one["top"] == "ja"
    assert one["share_ja"] == pytest.approx(0.32 / 0.38, abs=0.05)
    assert one["share_ja_low"] < 0.32 / 0.38 < one["share_ja_high"]
    assert one["p_adjusted"] == two["p_adjusted"] == 1 / 300
    assert two["low"] > 0.1
    assert all_["p_adjusted"] > 0.05
    assert all_["lape"] == pytest.approx(np.log(4), abs=0.02)
    assert np.isnan(idle["lape"])
    assert np.isnan(idle["p_adjusted"])


def test_exchanged_conditions_have_no_entropy_to_spare() -> None:
    n_trials, errors, excess = 40, 0, []
    for seed in range(n_trials):
        found = activation_entropy(null_counts(seed, 3), "lang", ("l0", "l1", "l2"), 8, n_resamples=99, seed=seed + 500)
        errors += found["p_adjusted"].min() <= 0.05
        excess.append(found["excess"].mean())
    assert errors / n_trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_trials)
    assert np.mean(excess) == pytest.approx(0, abs=0.002)


def test_what_cannot_be_compared_is_named() -> None:
    counts = null_counts(0)
    with pytest.raises(FrameError, match="expected two conditions or more of lang, got l0"):
        activation_entropy(counts, "lang", ("l0",), 8)
    with pytest.raises(FrameError, match="expected two or more of group_id with every one of l0, en, got 0"):
        log_odds_contrasts(counts, "lang", ("l0", "en"), 8)
