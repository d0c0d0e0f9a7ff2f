"""Documents for planted checkpoints: token ids with language, topic, channel and effort known for every token.

A document is BOS, an effort token, a channel token, then words. It keeps to one topic, so its tokens depend on each
other; function words are frequent, some words are shared by both languages. Groups are the unit, as in a real study.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from workbench.axes import EFFORTS, LANGUAGES, SPLITS, TOKEN_COLUMNS
from workbench.planted.design import N_TOPICS, Vocabulary

MODES = ("analysis", "final")
N_HEADER = 3
SHARES = {"function": 0.25, "shared": 0.25, "topic": 0.40, "any": 0.10}


@dataclass(frozen=True)
class Sheet:
    """One document: its labels, and the words that it was written with. `written_in` differs from `lang` in a null."""

    group: int
    lang: str
    written_in: str
    topic: int
    channel: str
    effort: str
    words: np.ndarray

    @property
    def ids(self) -> np.ndarray:
        header = (Vocabulary.BOS, Vocabulary.EFFORT[self.effort], Vocabulary.CHANNEL[self.channel])
        return np.concatenate((header, self.words))


def language_documents(
    n_groups: int, n_words: int = 96, seed: int = 0, topics_differ: bool = False, fertility: float = 1.0
) -> pl.DataFrame:
    """Each group in Japanese and in English, on the same topic and in the same channel. A tokens frame.

    topics_differ: the confound; Japanese keeps to the first half of the topics and English to the second.
    fertility: how many times more words Japanese needs for the same content.
    """
    rng = _stream(seed)
    sheets = []
    for group in range(n_groups):
        topic, half, channel = int(rng.integers(N_TOPICS)), N_TOPICS // 2, MODES[int(rng.integers(2))]
        for lang in LANGUAGES:
            about = topic % half + half * (lang == "en") if topics_differ else topic
            n = round(n_words * fertility) if lang == "ja" else n_words
            sheets.append(Sheet(group, lang, lang, about, channel, "medium", _words(lang, about, n, rng)))
    return tokens_frame(sheets)


def mode_documents(n_groups: int, n_words: int = 96, seed: int = 0) -> pl.DataFrame:
    """The header swap: each group once in the analysis and once in the final channel, with the very same words."""
    return tokens_frame(_swapped(n_groups, n_words, seed, MODES, ("medium",)))


def effort_documents(n_groups: int, n_words: int = 96, seed: int = 0) -> pl.DataFrame:
    """The header swap for effort: each group at low, medium and high with the very same words, in analysis."""
    return tokens_frame(_swapped(n_groups, n_words, seed, ("analysis",), EFFORTS))


def null_documents(n_groups: int, n_words: int = 96, seed: int = 0) -> pl.DataFrame:
    """Two documents of one language and topic per group, labelled ja and en by chance: any difference is chance."""
    rng = _stream(seed)
    sheets = []
    for group in range(n_groups):
        topic, written_in = int(rng.integers(N_TOPICS)), LANGUAGES[int(rng.integers(2))]
        channel = MODES[int(rng.integers(2))]
        for lang in LANGUAGES:
            words = _words(written_in, topic, n_words, rng)
            sheets.append(Sheet(group, lang, written_in, topic, channel, "medium", words))
    return tokens_frame(sheets)


def _stream(seed: int) -> np.random.Generator:
    """Random numbers for documents alone: a trial flips signs with the same seed, and must not share them."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))


def sequences(tokens: pl.DataFrame) -> list[list[int]]:
    """The token ids of each document, in the frame's order."""
    return tokens.group_by("doc_id", maintain_order=True).agg("token_id")["token_id"].to_list()


def _swapped(
    n_groups: int, n_words: int, seed: int, channels: Sequence[str], efforts: Sequence[str]
) -> Iterable[Sheet]:
    rng = _stream(seed)
    for group in range(n_groups):
        topic, lang = int(rng.integers(N_TOPICS)), LANGUAGES[int(rng.integers(2))]
        words = _words(lang, topic, n_words, rng)
        for channel in channels:
            for effort in efforts:
                yield Sheet(group, lang, lang, topic, channel, effort, words)


def _words(lang: str, topic: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """n words: frequent function words, words of the topic, any words, and words that both languages have."""
    content = Vocabulary.content_words(lang)
    # A topic has its favourites among the shared words too, so that these depend on the document as words do.
    favourites = np.roll(1 / np.arange(1, len(Vocabulary.SHARED) + 1), topic * 5)
    pools = {
        "function": rng.choice(Vocabulary.function_words(lang), n),
        "shared": rng.choice(Vocabulary.SHARED, n, p=favourites / favourites.sum()),
        "topic": rng.choice(content[topic::N_TOPICS], n),
        "any": rng.choice(content, n),
    }
    which = rng.choice(len(SHARES), n, p=list(SHARES.values()))
    return np.stack([pools[name] for name in SHARES])[which, np.arange(n)]


def tokens_frame(sheets: Iterable[Sheet]) -> pl.DataFrame:
    """One row per token with axes.TOKEN_COLUMNS; the header is scaffolding, every word belongs to its channel."""
    sheets = list(sheets)
    lengths = [len(sheet.ids) for sheet in sheets]
    ids, place = np.concatenate([sheet.ids for sheet in sheets]), np.concatenate([np.arange(n) for n in lengths])
    labels = pl.DataFrame(
        {
            "doc_id": [f"{sheet.group:05}-{sheet.lang}-{sheet.channel}-{sheet.effort}" for sheet in sheets],
            "group_id": [f"{sheet.group:05}" for sheet in sheets],
            "split": [SPLITS[sheet.group % 2] for sheet in sheets],
            "topic": [f"topic{sheet.topic}" for sheet in sheets],
            "lang": [sheet.lang for sheet in sheets],
            "effort": [sheet.effort for sheet in sheets],
            "channel": [sheet.channel for sheet in sheets],
            "n": lengths,
        }
    )
    in_words = place >= N_HEADER
    tokens = labels.select(pl.exclude("n").repeat_by("n").explode()).with_columns(
        script=pl.lit("std"),
        pos=pl.Series(place),
        token_id=pl.Series(ids),
        token=pl.Series(_NAMES[ids]),
        token_class=pl.Series(np.where(in_words, np.where(ids >= Vocabulary.SHARED[0], "digit", "latin"), "special")),
        word_initial=pl.lit(True),
        segment=pl.when(pl.Series(in_words)).then("channel").otherwise(pl.Series(np.where(place, "control", "bos"))),
        segment_index=pl.Series(np.where(in_words, 2, np.minimum(place, 1))),
        pos_in_segment=pl.Series(np.where(in_words, place - N_HEADER, np.maximum(place - 1, 0))),
        phase=pl.lit("prefill"),
    )
    return tokens.select(TOKEN_COLUMNS)


_NAMES = np.array([Vocabulary.name(token_id) for token_id in range(Vocabulary.SIZE)])
