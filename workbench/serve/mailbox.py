"""What the scheduler's thread tells a reader on an event loop, with a bound on what waits for a slow one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from workbench.serve.choice import Ended, Written


class Mailbox:
    """Events of one request's choices. `is_full` says that `room` are waiting; `on_room` is called when they are read.

    The bound is kept by the scheduler, which lets choices with a full mailbox sit out; so at most one event per choice
    and its end come on top.
    """

    def __init__(self, room: int | None = None, on_room: Callable[[], object] = lambda: None) -> None:
        self._loop = asyncio.get_running_loop()
        self._room, self._on_room = room, on_room
        self._lock = threading.Lock()
        self._events: list[Written | Ended] = []
        self._arrived = asyncio.Event()

    def put(self, event: Written | Ended) -> None:
        """From the scheduler's thread."""
        with self._lock:
            self._events.append(event)
            first = len(self._events) == 1
        if first:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._arrived.set)

    def is_full(self) -> bool:
        return self._room is not None and len(self._events) >= self._room

    async def take(self) -> list[Written | Ended]:
        """All events that wait, once there are some."""
        await self._arrived.wait()
        self._arrived.clear()
        with self._lock:
            was_full, events, self._events = self.is_full(), self._events, []
        if was_full:
            self._on_room()
        return events
