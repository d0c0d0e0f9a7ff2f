"""Does an expert follow the language or the writing? Both languages in both scripts, the same texts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from workbench.errors import FrameError
from workbench.stats.load import frequency_cube
from workbench.stats.resampling import t_interval

# cell of the design -> sign in the language effect (Japanese +), sign in the script effect (Japanese script +)
SIGNS: Mapping[str, tuple[int, int]] = {"ja std": (1, 1), "ja romaji": (1, -1), "en kana": (-1, 1), "en std": (-1, -1)}


def language_and_script(counts: pl.DataFrame, n_experts: int) -> pl.DataFrame:
    """The two main effects of the two by two design on every expert's selection frequency: one row per layer, expert.

    counts: `load.slot_counts` by [group_id, "writing"], writing being "ja std", "ja romaji", "en kana" or "en std".
    With f the share of a group's tokens that chose the expert, language = (f_ja std + f_ja romaji - f_en kana - f_en
    std) / 2 and script = (f_ja std + f_en kana - f_ja romaji - f_en std) / 2, both in [-1, 1], means over groups with
    95% intervals by Student's t: language, language_low, language_high, script, script_low, script_high, and n_groups,
    n_tests. Null: 0. A 2 x 2 design of this project's. Tokenizers cut the transcriptions finer, so that they also
    differ in words: an effect of script may be one of vocabulary. Raises FrameError when no group has all four.
    """
    groups, layers, f = frequency_cube(counts, "writing", list(SIGNS), n_experts)  # [writing group layer expert]
    if not groups:
        raise FrameError(f"writing: expected groups with {', '.join(SIGNS)}, got none.")
    frames = []
    for place, name in enumerate(("language", "script")):
        signs = np.array([sign[place] for sign in SIGNS.values()])
        effect = np.einsum("w,wgle->gle", signs, f) / 2  # [group layer expert]
        low, high = t_interval(effect)
        frames.append({name: effect.mean(0).ravel(), f"{name}_low": low.ravel(), f"{name}_high": high.ravel()})
    n = len(layers) * n_experts
    return pl.DataFrame(
        {
            "layer": np.repeat(layers, n_experts),
            "expert": np.tile(np.arange(n_experts), len(layers)),
            **frames[0],
            **frames[1],
            "n_groups": np.full(n, len(groups)),
            "n_tests": np.full(n, n),
        }
    )
