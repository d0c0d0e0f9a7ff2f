"""Sets of prompts in two versions that differ in one thing: language, effort, or the channel of the same words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workbench.chat.parse import label_tokens
from workbench.chat.render import render, render_tokens
from workbench.errors import ConfigError
from workbench.io.prompts import Prompt, parallel_pairs
from workbench.io.tokens import Tokenizer

_DATE = "2026-01-01"  # rendered into the system message: the same in every version


@dataclass(frozen=True, eq=False)
class Contrast:
    """Token sequences, unit by unit in both versions, and the positions to read in each.

    Raises ConfigError when the versions do not pair up, or nothing is read in some sequence.
    """

    name: str
    positive: Sequence[Sequence[int]]
    negative: Sequence[Sequence[int]]
    read_positive: Sequence[Sequence[int]]
    read_negative: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        sizes = {len(part) for part in (self.positive, self.negative, self.read_positive, self.read_negative)}
        if len(sizes) != 1 or 0 in sizes:
            raise ConfigError(f"contrast: expected as many sequences as places to read in each version, got {sizes}.")
        if not all(places for read in (self.read_positive, self.read_negative) for places in read):
            raise ConfigError("contrast: expected a position to read in every sequence, got a sequence without one.")


def language_contrast(prompts: Iterable[Prompt], tokenizer: Tokenizer, effort: str = "low") -> Contrast:
    """Japanese minus English: parallel prompts as user messages, read at every token of the message."""
    pairs = parallel_pairs(prompts)
    versions = [[chat(prompt.text, tokenizer, effort) for prompt in side] for side in zip(*pairs, strict=True)]
    reads = [[_labelled(ids, tokenizer, "user") for ids in side] for side in versions]
    return Contrast("language: ja - en", *versions, *reads)


def effort_contrast(prompts: Iterable[Prompt], tokenizer: Tokenizer, more: str = "high", less: str = "low") -> Contrast:
    """One prompt under two efforts, read at the last token, where the answer is about to begin."""
    prompts = list(prompts)
    versions = [[chat(prompt.text, tokenizer, effort) for prompt in prompts] for effort in (more, less)]
    return Contrast(f"effort: {more} - {less}", *versions, *([[len(ids) - 1] for ids in side] for side in versions))


def channel_contrast(
    prompts: Iterable[Prompt], texts: Sequence[str], tokenizer: Tokenizer, effort: str = "medium"
) -> Contrast:
    """The same words after the same prompt as analysis and as final message, read at every token of them.

    `texts` has what the assistant says, one for each prompt.
    """
    channels = ("analysis", "final")
    versions = [
        [
            _in_channel(prompt.text, text, channel, tokenizer, effort)
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        for channel, prompts in zip(channels, [list(prompts)] * 2, strict=True)
    ]
    reads = [
        [_labelled(ids, tokenizer, channel) for ids in side] for channel, side in zip(channels, versions, strict=True)
    ]
    return Contrast("channel: analysis - final", *versions, *reads)


def chat(text: str, tokenizer: Tokenizer, effort: str = "low") -> list[int]:
    """A user message, rendered up to where the assistant begins."""
    return render_tokens([{"role": "user", "content": text}], tokenizer, effort=effort, date=_DATE)


def _in_channel(prompt: str, text: str, channel: str, tokenizer: Tokenizer, effort: str) -> list[int]:
    opened = render([{"role": "user", "content": prompt}], effort=effort, date=_DATE)
    return tokenizer.to_tokens(f"{opened}<|channel|>{channel}<|message|>{text}", bos=False)


def _labelled(ids: Sequence[int], tokenizer: Tokenizer, segment: str) -> list[int]:
    return [pos for pos, label in enumerate(label_tokens(ids, tokenizer)) if label == segment]
