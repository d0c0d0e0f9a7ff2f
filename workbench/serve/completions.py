"""/v1/completions: raw continuation and scoring of texts and token ids."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from workbench.serve.answer import Text, echoed
from workbench.serve.choice import Ask, Choice, Ended, Logprob, Written
from workbench.serve.errors import naming
from workbench.serve.logprobs import Offsets, text_logprobs
from workbench.serve.mailbox import Mailbox
from workbench.serve.schema import CompletionRequest
from workbench.serve.service import Service, new_id, stops

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class Prompt:
    """Token ids, of which the first `hidden` were added here and are not echoed."""

    ids: list[int]
    hidden: int


class Completion:
    """One request, checked. Raises ApiError naming the field that is wrong."""

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        self.service, self.body = service, body
        self.id, self.created = new_id("cmpl"), int(time.time())
        self.prompts = self._prompts()
        n_new = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if body.max_tokens is None:  # the default gives way to a long prompt
            longest = max(len(prompt.ids) for prompt in self.prompts)
            n_new = max(min(n_new, service.engine.n_ctx - longest), 0)
        self.asks = [
            replace(ask, logprobs=body.logprobs, score_prompt=bool(body.echo) and body.logprobs is not None)
            for ask in service.asks(body, [prompt.ids for prompt in self.prompts], n_new, "max_tokens")
        ]

    def choices(self, mailbox: Mailbox) -> list[Choice]:
        def writer(ask: Ask) -> Text:
            return Text(self.service.tokenizer, ask.prompt, stops(self.body), ask.stop_ids, bool(self.body.echo))

        return self.service.choices(self.asks, self.body.n or 1, writer, mailbox)

    async def whole(self, choices: Sequence[Choice], events: AsyncIterator[Written | Ended]) -> dict[str, Any]:
        """The answer, once all choices have ended."""
        texts, logprobs = [""] * len(choices), [[] for _ in choices]  # type: ignore[var-annotated]
        async for event in events:
            texts[event.index] += "".join(event.deltas)
            if isinstance(event, Written):
                logprobs[event.index].append(event.logprob)
        return {
            **self._head(),
            "choices": [self._choice(*one) for one in zip(choices, texts, logprobs, strict=True)],
            "usage": self.usage(choices),
        }

    async def stream(
        self, choices: Sequence[Choice], events: AsyncIterator[Written | Ended]
    ) -> AsyncIterator[dict[str, Any]]:
        """The answer in pieces, each with what one token made certain; the usage last, if it was asked for."""
        offsets: dict[int, Offsets] = {}
        async for event in events:
            choice = choices[event.index]
            if event.index not in offsets:  # its prompt has been read
                prompt, scored, offsets[event.index] = self._echo(choice)
                if self.body.echo:
                    yield self._chunk(choice, prompt, scored)
            if isinstance(event, Written):
                offset = offsets[event.index].next(event.token_id)
                shown = None
                if event.logprob is not None:
                    shown = text_logprobs(self.service.tokenizer, [event.token_id], [event.logprob], [offset])
                if event.deltas or shown:
                    yield self._chunk(choice, "".join(event.deltas), shown)
            else:
                routing = self.service.routing(choice)
                extra = {} if routing is None else {"routing": routing}
                yield self._chunk(choice, "".join(event.deltas), None, choice.reason, **extra)
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield {**self._head(), "choices": [], "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        n_prompt = sum(len(prompt.ids) for prompt in self.prompts)
        n_written = sum(len(choice.written) for choice in choices)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_written, "total_tokens": n_prompt + n_written}

    def _prompts(self) -> list[Prompt]:
        given = self.body.prompt
        several: list[Any] = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        self.service.check_choices(len(several), self.body.n or 1)
        bos = self.body.add_special_tokens is not False
        found = []
        for position, one in enumerate(several):
            name = f"prompt[{position}]" if several is given else "prompt"
            if isinstance(one, str):
                with naming(name):
                    found.append(self._tokenized(one, bos))
            else:
                found.append(Prompt(list(one), 0))
            self.service.check_ids(name, found[-1].ids)
        return found

    def _tokenized(self, text: str, bos: bool) -> Prompt:
        """Behind one <|startoftext|>: that which was asked for, or the text's own."""
        ids = self.service.tokenizer.to_tokens(text, bos=bos)
        doubled = bos and ids[1:2] == ids[:1]
        return Prompt(ids[doubled:], int(bos and not doubled))

    def _choice(self, choice: Choice, text: str, logprobs: list[Logprob]) -> dict[str, Any]:
        prompt, scored, offsets = self._echo(choice)
        routing = self.service.routing(choice)
        shown = None
        if self.body.logprobs is not None:
            places = [offsets.next(token_id) for token_id in choice.written]
            shown = text_logprobs(self.service.tokenizer, choice.written, logprobs, places)
            if scored is not None:
                shown = {name: [*scored[name], *values] for name, values in shown.items()}
        return {
            "index": choice.index,
            "text": prompt + text,
            "finish_reason": choice.reason,
            "logprobs": shown,
            **({} if routing is None else {"routing": routing}),
        }

    def _echo(self, choice: Choice) -> tuple[str, dict[str, Any] | None, Offsets]:
        """The prompt's text and log-probabilities, if it is echoed; and the offsets of what follows."""
        prompt = self.prompts[choice.index // (self.body.n or 1)]
        tokenizer = self.service.tokenizer
        if not self.body.echo:
            return "", None, Offsets(tokenizer, tokenizer.is_special(prompt.ids[-1]))
        offsets = Offsets(tokenizer, True, hidden=prompt.hidden)
        places = [offsets.next(token_id) for token_id in prompt.ids]
        scored = None
        if self.body.logprobs is not None:
            scored = text_logprobs(tokenizer, prompt.ids, [None, *choice.prompt_logprobs], places)
        return echoed(tokenizer, prompt.ids, prompt.hidden), scored, offsets

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.service.identity.name,
        }

    def _chunk(
        self, choice: Choice, text: str, logprobs: Any = None, finish_reason: str | None = None, **extra: Any
    ) -> dict[str, Any]:
        one = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason, **extra}
        return {**self._head(), "choices": [one]}
