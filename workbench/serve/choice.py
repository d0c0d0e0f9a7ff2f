"""One choice of an answer: what was asked, what has been written, and where it stands.

    WAITING -> PREFILL -> DECODE -> ENDED        any state -> ENDED by cancelling, a deadline or an error

A choice waits for a cache; its prompt goes through the model chunk by chunk; then each pass adds a token. Every change
of state happens in the scheduler's thread.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from workbench.interventions import Intervention
from workbench.models.cache import KVCache
from workbench.models.sampling import Sampler, Sampling, check_finite
from workbench.models.stopping import ThinkingBudget


class State(enum.Enum):
    WAITING, PREFILL, DECODE, ENDED = range(4)


class Logprob(NamedTuple):
    """A token's log-probability in nats before penalties and temperature, and the most probable (id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Written:
    """A token as it comes: what its text became certain of (any value that the choice's writer gives)."""

    index: int
    token_id: int
    deltas: Sequence[Any]
    logprob: Logprob | None


@dataclass(frozen=True)
class Ended:
    """The last of a choice: "stop", "length", "cancelled", "timeout" or "error" (then `error` says which)."""

    index: int
    reason: str
    deltas: Sequence[Any] = ()
    error: Exception | None = None


class Writer(Protocol):
    """Turns ids into what a client sees; `stopped` is True once a stop string was found."""

    @property
    def stopped(self) -> bool: ...

    def push(self, token_id: int) -> Sequence[Any]: ...
    def finish(self) -> Sequence[Any]: ...


class IdsOnly:
    """The writer that shows nothing."""

    stopped = False

    def push(self, token_id: int) -> Sequence[Any]:
        return ()

    def finish(self) -> Sequence[Any]:
        return ()


@dataclass(frozen=True)
class Ask:
    """What one choice is to be, checked before it is queued.

    max_new_tokens: 0 reads the prompt and writes nothing. items: interventions, in order; lang: of the text, for those
    limited by language. logprobs: how many alternatives come with each token written, None for no log-probabilities;
    score_prompt: those of the prompt too. routing: keep which experts every token used, the last one included.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    items: tuple[Intervention, ...] = ()
    lang: str | None = None
    logprobs: int | None = None
    score_prompt: bool = False
    routing: bool = False
    max_thinking_tokens: int | None = None

    @property
    def n_positions(self) -> int:
        """Positions that the cache must hold."""
        return len(self.prompt) + self.max_new_tokens


class Choice:
    """A running `Ask`. `tell` gets `Written` and `Ended`; `held_up` says that its reader has enough for now."""

    def __init__(
        self,
        ask: Ask,
        tell: Callable[[Written | Ended], object],
        *,
        index: int = 0,
        writer: Writer | None = None,
        tokenizer: Any = None,
        seconds: float = float("inf"),
        held_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self.ask, self.index, self.tell, self.held_up = ask, index, tell, held_up
        self.state, self.cancelled = State.WAITING, False
        self.began, self.first_token_at = time.monotonic(), float("nan")
        self.deadline = self.began + seconds
        self.written: list[int] = []
        self.n_read = 0  # of the prompt
        self.cache: KVCache | None = None
        self.known: Any = None  # what its interventions are told of it, see Engine
        self.prompt_logprobs: list[Logprob] = []  # of prompt[1:]
        self.routes: list[tuple[Tensor, Tensor]] = []  # [pos layer k] each, in the order of positions
        self.reason = ""  # why it ended
        self.failure: Exception | None = None  # what went wrong with it alone
        self._writer: Writer = writer or IdsOnly()
        self._sampler = Sampler(ask.sampling, 1)
        self._budget: ThinkingBudget | None = None
        if ask.max_thinking_tokens is not None:
            self._budget = ThinkingBudget(tokenizer, ask.max_thinking_tokens)
            self._budget.see(ask.prompt, written=False)

    def begin_writing(self, d_vocab: int) -> None:
        """The prompt has been read."""
        self.state = State.DECODE
        prompt = torch.tensor([self.ask.prompt])
        self._sampler.see(prompt, torch.ones_like(prompt, dtype=torch.bool), d_vocab, written=False)

    def take(self, logits: Tensor) -> None:  # float32 [d_vocab]
        """Choose the next token from these logits, show it, and find out whether it is the last."""
        try:
            self._take(logits)
        except Exception as error:  # the others of its pass have their tokens, and go on
            self.failure = error

    def _take(self, logits: Tensor) -> None:
        check_finite(logits)
        token_id = self._choose(logits)
        self._sampler.see(torch.tensor([[token_id]]), torch.ones(1, 1, dtype=torch.bool), logits.shape[0])
        if self._budget is not None:
            self._budget.see([token_id])
        if not self.written:
            self.first_token_at = time.monotonic()
        self.written.append(token_id)
        logprob = None if self.ask.logprobs is None else logprobs_of(logits[None], [token_id], self.ask.logprobs)[0]
        self.tell(Written(self.index, token_id, self._writer.push(token_id), logprob))
        if token_id in self.ask.stop_ids or self._writer.stopped:
            self.reason = "stop"
        elif len(self.written) >= self.ask.max_new_tokens:
            self.reason = "length"

    def end(self, reason: str, error: Exception | None = None) -> None:
        """Tell the reader, once."""
        if self.state is not State.ENDED:
            self.state, self.reason = State.ENDED, reason
            self.tell(Ended(self.index, reason, self._writer.finish(), error))

    def _choose(self, logits: Tensor) -> int:
        chosen = int(self._sampler.choose(logits[None])[0])  # drawn in any case: a budget moves no random number
        dictated = None if self._budget is None else self._budget.dictated()
        return chosen if dictated is None else dictated


def logprobs_of(logits: Tensor, ids: Sequence[int], n_top: int) -> list[Logprob]:  # float32 [pos d_vocab]
    """The log-probability of each id at its position, and of the `n_top` most probable there."""
    check_finite(logits)
    logprobs = logits.log_softmax(-1)  # [pos d_vocab]
    own = logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
    top = logprobs.topk(min(n_top, logprobs.shape[-1]), dim=-1)
    alternatives = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        Logprob(token_id, value, tuple(zip(*others, strict=True)))
        for token_id, value, others in zip(ids, own, alternatives, strict=True)
    ]
