"""Continuous batching: a thread that alone touches the model, and takes choices in and lets them go at every step.

A round of the loop: let go of what was cancelled or is over time, give caches to those that wait (in their order, while
there are places), read one chunk of one prompt, then let every running choice write one token, a block at a time. A
choice whose reader is behind keeps its cache and sits out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from workbench.errors import WorkbenchError
from workbench.serve.choice import Choice, State
from workbench.serve.engine import Engine

IDLE_SECONDS = 0.25  # between two looks at deadlines while nobody can run

log = logging.getLogger(__name__)


class QueueFull(WorkbenchError):
    """More wait than the limit allows."""


class Stopping(WorkbenchError):
    """The server takes no new work."""


class Scheduler:
    """Runs choices on an engine: `submit`, `cancel`, `wake` from any thread; `start` before, `stop` at the end.

    on_step: called after every pass with its kind ("read" or "write"), its rows and its seconds; on_end: with every
    choice that ended. Both in the scheduler's thread.
    """

    def __init__(
        self,
        engine: Engine,
        on_step: Callable[[str, int, float], object] = lambda kind, rows, seconds: None,
        on_end: Callable[[Choice], object] = lambda choice: None,
    ) -> None:
        self.engine, self._on_step, self._on_end = engine, on_step, on_end
        self._changed = threading.Condition()
        self._waiting: deque[Choice] = deque()
        self._running: list[Choice] = []  # of the thread alone
        self._news = 0  # counts what may have changed since the thread last looked
        self._stopping = self._abandon = self.has_failed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def is_stopping(self) -> bool:
        return self._stopping

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def submit(self, choices: Sequence[Choice]) -> None:
        """Queue all of them or none. Raises QueueFull or Stopping."""
        with self._changed:
            if self._stopping:
                raise Stopping("server: expected to run, got a stop. Ask another one.")
            limit = self.engine.limits.queue
            if len(self._waiting) + len(choices) > limit:
                raise QueueFull(
                    f"queue: expected at most {limit} waiting, got {len(self._waiting)} already. Try later."
                )
            self._waiting.extend(choices)
            self._tell()

    def cancel(self, choices: Sequence[Choice]) -> None:
        """Let go of them at the next step, whatever their state."""
        for choice in choices:
            choice.cancelled = True
        self.wake()

    def wake(self) -> None:
        """A reader has caught up."""
        with self._changed:
            self._tell()

    def refuse(self) -> None:
        """From now on take no new work."""
        with self._changed:
            self._stopping = True
            self._tell()

    def stop(self, seconds: float) -> None:
        """Take no new work, finish what is there, for so many seconds; then end the rest as cancelled."""
        self.refuse()
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._abandon = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join()

    def _tell(self) -> None:
        self._news += 1
        self._changed.notify()

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:  # nobody may wait for a thread that is gone
            log.exception("the scheduler failed")
            self.has_failed = True
            self.refuse()
            for choice in [*self._running, *self._waiting]:
                choice.end("error", error)
            self._running, self._waiting = [], deque()

    def _loop(self) -> None:
        news = 0
        while True:
            with self._changed:
                if self._stopping and not self._waiting and not self._running:
                    return
                if news == self._news and not self._busy():
                    idle = not self._running and not self._waiting
                    self._changed.wait(None if idle else IDLE_SECONDS)
                news = self._news
            self._round()

    def _busy(self) -> bool:
        """Whether some choice can go on without news of a reader."""
        return any(choice.state is State.PREFILL or not choice.held_up() for choice in self._running)

    def _round(self) -> None:
        self._let_go()
        self._admit()
        self._read()
        for block in self._blocks():
            self._write(block)
        self._retire()

    def _let_go(self) -> None:
        now = time.monotonic()
        with self._changed:
            found = [*self._running, *self._waiting]
            gone = {id(one): self._cause(one, now) for one in found if self._cause(one, now)}
            self._waiting = deque(choice for choice in self._waiting if id(choice) not in gone)
        for choice in found:
            if id(choice) in gone:
                self._end(choice, gone[id(choice)])
        self._running = [choice for choice in self._running if choice.state is not State.ENDED]

    def _cause(self, choice: Choice, now: float) -> str:
        if choice.cancelled or self._abandon:
            return "cancelled"
        return "timeout" if now > choice.deadline else ""

    def _admit(self) -> None:
        while len(self._running) < self.engine.limits.running:
            with self._changed:
                if not self._waiting:
                    return
                choice, error = self._waiting[0], None
                try:
                    cache = self.engine.pool.take(choice.ask.n_positions)
                except Exception as problem:  # the device's memory may be another's by now
                    log.exception("no cache for %d positions", choice.ask.n_positions)
                    cache, error = None, problem
                if cache is None and error is None:  # none is passed over: a long one would wait for ever
                    return
                self._waiting.popleft()
            if cache is None:
                self._end(choice, "error", error)
                continue
            choice.cache, choice.state = cache, State.PREFILL
            self._running.append(choice)

    def _read(self) -> None:
        choice = next((one for one in self._running if one.state is State.PREFILL), None)
        if choice is not None:
            self._step("read", [choice])

    def _blocks(self) -> Iterator[list[Choice]]:
        ready = [one for one in self._running if one.state is State.DECODE and not one.held_up()]
        ready = [one for one in ready if not self.engine.is_complete(one)]
        rows = self.engine.limits.rows
        for start in range(0, len(ready), rows):
            yield ready[start : start + rows]

    def _write(self, block: list[Choice]) -> None:
        if self._step("write", block) or len(block) == 1:
            return
        for choice in block:  # one of them failed and took the pass with it: the others go on without it
            self._step("write", [choice])

    def _step(self, kind: str, choices: list[Choice]) -> bool:
        """One pass; False when it failed. A choice that fails alone ends with its error."""
        began = time.perf_counter()
        try:
            self.engine.read(choices[0]) if kind == "read" else self.engine.write(choices)
        except Exception as error:  # whatever it is, the thread serves the others
            if not isinstance(error, WorkbenchError):
                log.exception("a %s pass of %d failed", kind, len(choices))
            if len(choices) == 1:
                self._end(choices[0], "error", error)
            return False
        self._on_step(kind, len(choices), time.perf_counter() - began)
        for choice in choices:
            if choice.failure is not None:
                self._end(choice, "error", choice.failure)
        return True

    def _retire(self) -> None:
        for choice in self._running:
            if choice.state is not State.ENDED and self.engine.is_complete(choice):
                self._end(choice, choice.reason)
        self._running = [choice for choice in self._running if choice.state is not State.ENDED]

    def _end(self, choice: Choice, reason: str, error: Exception | None = None) -> None:
        if choice.cache is not None:
            self.engine.pool.give_back(choice.cache)
            choice.cache = None
        choice.end(reason, error)
        self._on_end(choice)
        with self._changed:  # its place and its cache are free for one that waits
            self._news += 1
