"""Language and script are told apart where the answer is known."""

from __future__ import annotations

import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.scripts import SIGNS, language_and_script

N_TOKENS = 100
# shares of a group's tokens that choose an expert, by writing: expert 0 follows the language, 1 the script, 2 neither
PLANTED = {
    "ja std": (0.5, 0.5, 0.2),
    "ja romaji": (0.5, 0.1, 0.2),
    "en kana": (0.1, 0.5, 0.2),
    "en std": (0.1, 0.1, 0.2),
}


def counts(n_groups: int = 6, jitter: int = 3) -> pl.DataFrame:
    rows = [
        (f"g{group}", writing, 4, expert, f * N_TOKENS + (group * (expert + 1)) % jitter, N_TOKENS)
        for group in range(n_groups)
        for writing, shares in PLANTED.items()
        for expert, f in enumerate(shares)
    ]
    names = ["group_id", "writing", "layer", "expert", "slots", "n_tokens"]
    return pl.DataFrame(rows, schema=names, orient="row", strict=False)


def test_planted_effects_are_found() -> None:
    found = language_and_script(counts(), 4)
    assert found.select("language").to_series().to_list() == pytest.approx([0.4, 0.0, 0.0, 0.0], abs=1e-9)
    assert found.select("script").to_series().to_list() == pytest.approx([0.0, 0.4, 0.0, 0.0], abs=1e-9)
    assert found["layer"].unique().to_list() == [4]
    assert found.select("n_groups", "n_tests").row(0) == (6, 4)
    inside = (pl.col("language_low") <= pl.col("language")) & (pl.col("language") <= pl.col("language_high"))
    assert found.select(inside.all()).item()


def test_intervals_widen_with_disagreement() -> None:
    noisy = counts().with_columns(
        slots=pl.col("slots")
        + pl.when((pl.col("group_id") == "g0") & (pl.col("writing") == "ja std")).then(20).otherwise(0)
    )
    wide, narrow = (language_and_script(part, 4) for part in (noisy, counts()))
    assert (wide["language_high"] - wide["language_low"])[0] > (narrow["language_high"] - narrow["language_low"])[0]


def test_the_design_is_balanced_and_needs_all_four() -> None:
    assert [sum(sign[place] for sign in SIGNS.values()) for place in (0, 1)] == [0, 0]
    assert sum(language * script for language, script in SIGNS.values()) == 0
    with pytest.raises(FrameError, match="got none"):
        language_and_script(counts().filter(pl.col("writing") != "en kana"), 4)
