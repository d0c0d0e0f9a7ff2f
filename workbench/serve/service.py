"""A running server without its HTTP: the model, the scheduler, and how a request becomes choices and is followed."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from workbench.errors import WorkbenchError
from workbench.interventions import Intervention, from_json
from workbench.interventions.order import check_order
from workbench.models import Llama
from workbench.models.sampling import Sampling, row_seeds
from workbench.serve.choice import Ask, Choice, Ended, Writer, Written
from workbench.serve.engine import Engine
from workbench.serve.errors import ApiError, invalid, naming
from workbench.serve.limits import Limits
from workbench.serve.mailbox import Mailbox
from workbench.serve.metrics import Metrics
from workbench.serve.routing import routing_record
from workbench.serve.scheduler import QueueFull, Scheduler, Stopping
from workbench.serve.schema import Common

RETRY_AFTER = 1  # seconds, told to whom the queue has no room for


@dataclass(frozen=True)
class Identity:
    """What the server is called and does to every request: `items` act before a request's own interventions."""

    name: str
    items: tuple[Intervention, ...] = ()
    date: str | None = None  # of every chat that names none; None for today
    api_key: str | None = None


class Service:
    """Raises WorkbenchError for a model that cannot be served, or items that do not fit it."""

    def __init__(self, model: Llama, identity: Identity, limits: Limits, free_bytes: int) -> None:
        check_order(identity.items, model)
        self.model, self.identity, self.limits = model, identity, limits
        self.engine = Engine(model, limits, free_bytes)
        self.metrics = Metrics()
        self.scheduler = Scheduler(self.engine, self.metrics.on_step, self.metrics.on_end)
        self.metrics.watch(self.scheduler)

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    def check_choices(self, n_prompts: int, n: int) -> None:
        """Raises ApiError for more than one request may ask for; looked at before anything is read or made."""
        if n_prompts * n > self.limits.choices:
            raise invalid("n", f"n: expected at most {self.limits.choices} choices in all, got {n_prompts * n}.")

    def asks(
        self, body: Common, prompts: Sequence[Sequence[int]], max_new_tokens: int | None, limit_name: str
    ) -> list[Ask]:
        """An ask for each prompt of a request, checked. Raises ApiError naming the field that is wrong."""
        if body.routing and not self.engine.layers:
            raise invalid("routing", "routing: expected a model with experts, got one without. Leave it out.")
        items, sampling = self._items(body), self._sampling(body)
        return [
            Ask(
                tuple(prompt), self._n_new(prompt, max_new_tokens, limit_name), sampling, tuple(self.model.stop_ids),
                items, body.lang, routing=bool(body.routing),
            )
            for prompt in prompts
        ]  # fmt: skip

    def _n_new(self, prompt: Sequence[int], max_new_tokens: int | None, limit_name: str) -> int:
        room = self.engine.n_ctx - len(prompt)
        wanted = room if max_new_tokens is None else max_new_tokens
        if wanted > room or (max_new_tokens is None and room < 1):
            raise invalid(
                limit_name,
                f"{limit_name}: expected prompt and answer of at most {self.engine.n_ctx} tokens, got a prompt of "
                f"{len(prompt)} and {wanted if max_new_tokens else 'an answer'} more. Shorten either.",
                "context_length_exceeded",
            )
        return wanted

    def check_ids(self, param: str, ids: Sequence[int]) -> None:
        d_vocab = self.model.cfg.d_vocab
        if not ids:
            raise invalid(param, f"{param}: expected at least one token, got none. Give some text.")
        if max(ids) >= d_vocab:
            raise invalid(param, f"{param}: expected token ids from 0 to {d_vocab - 1}, got {max(ids)}.")

    def choices(self, asks: Sequence[Ask], n: int, writer: Callable[[Ask], Writer], mailbox: Mailbox) -> list[Choice]:
        """`n` choices of each ask, each with a seed of its own, as `model.generate` would seed its rows."""
        self.check_choices(len(asks), n)
        made: list[Choice] = []
        for ask in asks:
            seed = ask.sampling.seed
            seeds = row_seeds(seed, n) if isinstance(seed, int) else [None] * n
            for own in seeds:
                sampling = replace(ask.sampling, seed=None if own is None else [own])
                made.append(
                    Choice(
                        replace(ask, sampling=sampling), mailbox.put, index=len(made), writer=writer(ask),
                        tokenizer=self.tokenizer, seconds=self.limits.seconds, held_up=mailbox.is_full,
                    )
                )  # fmt: skip
        return made

    def submit(self, choices: Sequence[Choice]) -> None:
        try:
            self.scheduler.submit(choices)
        except QueueFull as error:
            self.metrics.refused.labels("queue").inc()
            raise ApiError(429, str(error), code="queue_full", retry_after=RETRY_AFTER) from None
        except Stopping as error:
            raise ApiError(503, str(error), code="stopping", retry_after=RETRY_AFTER) from None

    async def events(self, choices: Sequence[Choice], mailbox: Mailbox) -> AsyncIterator[Written | Ended]:
        """What the choices tell, until all have ended; whoever stops listening earlier cancels them.

        Raises ApiError when one fails.
        """
        open_choices = len(choices)
        try:
            while open_choices:
                for event in await mailbox.take():
                    if isinstance(event, Ended):
                        open_choices -= 1
                        _raise_failure(event)
                    yield event
        finally:
            if open_choices:
                self.scheduler.cancel(choices)

    def routing(self, choice: Choice) -> dict[str, Any] | None:
        if not choice.ask.routing:
            return None
        ids = [*choice.ask.prompt, *choice.written]
        n_experts: int = self.model.cfg.n_experts  # type: ignore[union-attr]
        return routing_record(ids, len(choice.ask.prompt), self.engine.layers, n_experts, choice.routes)

    def _items(self, body: Common) -> tuple[Intervention, ...]:
        with naming("intervention"):
            own = () if body.intervention is None else from_json(body.intervention.model_dump())
            items = (*self.identity.items, *own)
            check_order(items, self.model)
        if body.lang is None and any(item.where.langs is not None for item in items):
            raise invalid("lang", "lang: expected a language, since an intervention is limited by it, got none.")
        return items

    def _sampling(self, body: Common) -> Sampling:
        bias = []
        for key, value in (body.logit_bias or {}).items():
            token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
            if str(token_id) != key or not 0 <= token_id < self.model.cfg.d_vocab:
                raise invalid("logit_bias", f"logit_bias: expected token ids as keys, got {key[:20]!r}.")
            bias.append((token_id, value))
        return Sampling(
            temperature=_or(body.temperature, 1.0),
            top_p=_or(body.top_p, 1.0),
            top_k=max(_or(body.top_k, 0), 0),
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            seed=body.seed,
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            presence_penalty=_or(body.presence_penalty, 0.0),
            logit_bias=tuple(bias),
        )


def _raise_failure(event: Ended) -> None:
    if event.reason == "timeout":
        raise ApiError(
            408, "time: expected an answer within the server's limit, got none. Ask for less.", code="timeout"
        )
    if event.reason == "cancelled":
        raise ApiError(503, "server: stopped before the answer was finished.", code="stopping")
    if isinstance(event.error, WorkbenchError):
        raise invalid("intervention", str(event.error))
    if event.error is not None:
        raise ApiError(500, "server: the pass failed; its log says why.", code="internal_error")


def stops(body: Common) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
