"""How far a study is, and where its time went."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 10.0  # between lines where there is no terminal to draw a bar on


def show_progress(missing: Sequence[int], n_parts: int, shown: bool = True) -> Iterator[int]:
    """Go through the missing batches; if `shown`, with a bar on a terminal, else a line every ten seconds (stderr)."""
    if not shown:
        yield from missing
        return
    done = n_parts - len(missing)
    if done and missing:
        print(f"study: continuing, {done} of {n_parts} batches are done", file=sys.stderr)
    if sys.stderr.isatty():
        yield from tqdm(missing, desc="study", unit="batch", initial=done, total=n_parts, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    for count, part in enumerate(missing, 1):
        yield part
        now = time.monotonic()
        if now - last > LOG_SECONDS or count == len(missing):
            left = (now - start) / count * (len(missing) - count)
            print(f"study: batch {done + count} of {n_parts}, {left:.0f} s left", file=sys.stderr, flush=True)
            last = now


class Stopwatch:
    """Adds up the seconds spent under each name."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - start

    def report(self) -> dict[str, Any]:
        """Seconds in all and under each name."""
        spent = {"total": time.monotonic() - self._start, **self._seconds}
        return {"seconds": {name: round(seconds, 2) for name, seconds in spent.items()}}
