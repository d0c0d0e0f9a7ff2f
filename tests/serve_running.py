"""A server on a port of its own, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from workbench.models import Llama
from workbench.serve import Limits
from workbench.serve.run import Server
from workbench.serve.service import Identity, Service

FREE = 1 << 30
LIMITS = Limits(rows=4, running=6, queue=32, prefill_chunk=16, cache_positions=2560, drain_seconds=60)


@dataclass
class Running:
    url: str
    service: Service

    def client(self, **settings: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **settings)  # type: ignore[arg-type]

    def post(self, path: str, body: dict) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json={"model": self.service.identity.name, **body})

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Until nobody runs or waits; fails when that takes too long."""
        scheduler, end = self.service.scheduler, time.monotonic() + seconds
        while scheduler.n_running or scheduler.n_waiting:
            assert time.monotonic() < end, f"{scheduler.n_running} run, {scheduler.n_waiting} wait"
            time.sleep(0.02)


@contextmanager
def running(model: Llama, limits: Limits = LIMITS, identity: Identity | None = None) -> Iterator[Running]:
    service = Service(model, identity or Identity("tiny", date="2026-01-01"), limits, FREE)
    started: list[str] = []
    server = Server(service, "127.0.0.1", 0, started.append)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        yield Running(started[0].split()[-1].removesuffix("/v1"), service)
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive(), "the server did not stop"
