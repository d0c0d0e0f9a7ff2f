"""What a server allows: how much runs at once, how long, how large."""

from __future__ import annotations

from dataclasses import dataclass, fields

from workbench.config import ModelConfig
from workbench.errors import ConfigError

SHARE = 0.5  # of the memory that is free at the start, for keys and values
PAGE = 128  # positions; caches are allocated in multiples


@dataclass(frozen=True)
class Limits:
    """Whole numbers of at least 1 and times in seconds above 0; raises ConfigError for others.

    rows: sequences that share one decoding pass, whose arithmetic is the same however many there are (see
    `workbench.models.blocks`); running: sequences that hold a cache at once, in as many passes as they need; queue:
    sequences that wait, beyond which requests are refused; choices: sequences of one request (prompts times n).
    prefill_chunk: columns of a prompt in one pass, between two of which every running sequence writes a token.
    cache_positions: keys and values of all running sequences together; None for half of the free memory. body_bytes:
    of one request. connections: open at once, idle ones too. seconds: for one request, waiting included, and for its
    body to arrive. stall_seconds: how long a client may send nothing of a body that it announced, or a reader take
    nothing of its answer; buffer: tokens kept for a slow reader before its sequence pauses. drain_seconds: for what
    runs when the server is told to stop.
    """

    rows: int = 8
    running: int = 32
    queue: int = 256
    choices: int = 128
    prefill_chunk: int = 256
    cache_positions: int | None = None
    body_bytes: int = 4 << 20
    connections: int = 1024
    seconds: float = 600.0
    stall_seconds: float = 60.0
    buffer: int = 64
    drain_seconds: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, times = getattr(self, field.name), field.name.endswith("seconds")
            if value is None and field.name == "cache_positions":
                continue
            kinds = (int, float) if times else (int,)
            if type(value) not in kinds or not 0 < value < float("inf"):
                expected = "a number of seconds above 0" if times else "a whole number of at least 1"
                raise ConfigError(f"{field.name}: expected {expected}, got {value!r}.")


def cache_positions(limits: Limits, cfg: ModelConfig, bytes_per_value: int, free_bytes: int) -> int:
    """How many positions all caches may hold together. Raises ConfigError when that is not even one page."""
    per_position = 2 * cfg.n_layers * cfg.n_kv_heads * cfg.d_head * bytes_per_value
    found = limits.cache_positions
    if found is None:
        found = min(int(free_bytes * SHARE) // per_position, limits.running * pages(cfg.n_ctx))
    if found < PAGE:
        raise ConfigError(
            f"cache_positions: expected at least {PAGE} ({per_position} bytes each), got {found}. Free memory, or "
            "name a number."
        )
    return found


def pages(n_positions: int) -> int:
    """The positions that a cache for so many really takes."""
    return -(-n_positions // PAGE) * PAGE
