"""What ends a row besides stop ids, and what is shown of it meanwhile: stop strings, streaming, thinking budgets.

All of it reads the ids that were written; nothing here touches the model. `tokenizer` is a workbench Tokenizer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from workbench.errors import ConfigError, ShapeError

CLOSING = "<|end|><|start|>assistant<|channel|>final<|message|>"


class TextWatch:
    """The text of one row as it is written: whole characters only, never any part of a stop string.

    `push` returns what became certain. Text that may yet turn out to begin a stop string is held back until it cannot;
    a stop string itself is never shown, and `stopped` is True once it was found.
    """

    def __init__(self, decoder: Any, stop_strings: Sequence[str]) -> None:
        self.decoder, self.stop_strings = decoder, stop_strings
        self.stopped = False
        self._held = ""

    def push(self, token_id: int) -> str:
        return self._release(self.decoder.push(token_id))

    def finish(self) -> str:
        """What was held back when the row ended for another reason."""
        if self.stopped:
            return ""
        text = self._release(self.decoder.finish())
        rest, self._held = ("" if self.stopped else self._held), ""
        return text + rest

    def _release(self, new: str) -> str:
        self._held += new
        found = [place for stop in self.stop_strings if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        n_held = max((_overlap(self._held, stop) for stop in self.stop_strings), default=0)
        split = len(self._held) - n_held
        text, self._held = self._held[:split], self._held[split:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


class ThinkingBudget:
    """Closes the analysis channel of one row after `limit` tokens in it, by the ids it dictates.

    `see` follows the row, prompt included; `dictated()` is the id that must come next, or None for the model's choice.
    Only tokens that the row writes itself count, over all analysis messages of one answer.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self.limit = limit
        self._start, self._channel, self._message = tokenizer.start_id, tokenizer.channel_id, tokenizer.message_id
        self._ends = (tokenizer.end_id, tokenizer.eos_id, tokenizer.call_id)
        self._analysis = tokenizer.to_tokens("<|channel|>analysis", bos=False)[1:]
        self._closing = tokenizer.to_tokens(CLOSING, bos=False)
        self._header: list[int] | None = None  # ids since <|channel|>, while a header is open
        self._thinking = False
        self._spent = 0
        self._queue: deque[int] = deque()

    def see(self, ids: Iterable[int], written: bool = True) -> None:
        for token_id in ids:
            if self._queue:
                self._queue.popleft()
            if token_id in (self._start, self._channel):
                self._thinking, self._header = False, [] if token_id == self._channel else None
            elif token_id == self._message:
                self._thinking = (self._header or [])[: len(self._analysis)] == self._analysis
                self._header = None
            elif token_id in self._ends:
                self._thinking, self._header = False, None
            elif self._header is not None:
                self._header.append(token_id)
            elif self._thinking:
                self._spent += written

    def dictated(self) -> int | None:
        if not self._queue and self._thinking and self._spent >= self.limit:
            self._queue.extend(self._closing)
        return self._queue[0] if self._queue else None


def check_stop_strings(stop_strings: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stop_strings, str) or not isinstance(stop_strings, Sequence):
        raise ShapeError(f"stop_strings: expected a list of strings, got {stop_strings!r}. Write [{stop_strings!r}].")
    for stop in stop_strings:
        if not isinstance(stop, str) or not stop:
            raise ShapeError(f"stop_strings: expected strings of one character or more, got {stop!r}.")
    return tuple(stop_strings)


def need_tokenizer(tokenizer: Any, what: str) -> Any:
    """The tokenizer. Raises ConfigError when the model has none, naming what asked for it."""
    if tokenizer is None:
        raise ConfigError(f"{what}: expected a model with a tokenizer, got one without. Load a checkpoint that has it.")
    return tokenizer
