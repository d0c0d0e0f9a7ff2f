"""What a server counts, for Prometheus."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from workbench.serve.choice import Choice

if TYPE_CHECKING:
    from workbench.serve.scheduler import Scheduler

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """All in a registry of its own, so that several servers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry, "namespace": "workbench"}
        self.requests = Counter("requests", "Requests by path and status.", ["path", "status"], **made)
        self.refused = Counter("refused", "Requests refused before they ran, by reason.", ["reason"], **made)
        self.ended = Counter("choices", "Choices by what ended them.", ["reason"], **made)
        self.tokens = Counter("tokens", "Tokens read from prompts and written.", ["phase"], **made)
        self.first_token = Histogram("first_token_seconds", "Until the first token.", buckets=SECONDS, **made)
        self.duration = Histogram("choice_seconds", "Until a choice ended, waiting included.", buckets=SECONDS, **made)
        self.step = Histogram("pass_seconds", "One pass of the model.", ["phase"], buckets=SECONDS, **made)
        self.rows = Histogram("pass_rows", "Choices that share a writing pass.", buckets=ROWS, **made)
        self._made = made

    def watch(self, scheduler: Scheduler) -> None:
        pool = scheduler.engine.pool
        for name, text, value in (
            ("running", "Choices that hold a cache.", lambda: scheduler.n_running),
            ("waiting", "Choices that wait for one.", lambda: scheduler.n_waiting),
            ("cache_positions_used", "Positions of caches in use.", lambda: pool.n_used),
            ("cache_positions_limit", "Positions that caches may take.", lambda: pool.n_positions),
        ):
            Gauge(name, text, **self._made).set_function(value)

    def on_step(self, kind: str, n_rows: int, seconds: float) -> None:
        self.step.labels({"read": "prefill", "write": "decode"}[kind]).observe(seconds)
        if kind == "write":
            self.rows.observe(n_rows)

    def on_end(self, choice: Choice) -> None:
        self.ended.labels(choice.reason).inc()
        self.tokens.labels("prefill").inc(choice.n_read)
        self.tokens.labels("decode").inc(len(choice.written))
        self.duration.observe(time.monotonic() - choice.began)
        if choice.written:
            self.first_token.observe(choice.first_token_at - choice.began)

    def text(self) -> bytes:
        return generate_latest(self.registry)
