"""What a study will run: which prompts, in which rendering, in which order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from workbench.axes import EFFORTS, LANGUAGES
from workbench.chat import Message, render_tokens
from workbench.errors import ConfigError, PromptError, RunError
from workbench.interventions import Intervention, to_json
from workbench.io.prompts import Prompt
from workbench.io.tokens import Tokenizer

TEMPLATES = ("harmony", "plain")
STUDIED_KINDS = ("parallel", "reasoning")  # "script" prompts compare writing systems, not languages


@dataclass(frozen=True)
class Settings:
    """How a study runs; everything here decides its result.

    template: "harmony" renders a chat, one per effort, without BOS, as the thinking models were trained; "plain" gives
    a base model the bare text after BOS, without effort. max_new_tokens: 0 writes no answers. date: the current date
    told to the model. batch_size: documents per pass; it decides the last bits of the numbers, so it is a setting too.
    interventions: act while answers are written and while their routing is read.
    router_logits: also keep the logits of all experts; norms: also measure how much each chosen expert adds.
    """

    template: str = "harmony"
    efforts: tuple[str, ...] = EFFORTS
    max_new_tokens: int = 192
    batch_size: int = 32
    date: str = "2026-01-01"
    interventions: tuple[Intervention, ...] = ()
    router_logits: bool = False
    norms: bool = False

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise RunError(
                f"template: expected one of {', '.join(TEMPLATES)}, got {self.template!r}. Pass one of them."
            )
        unknown = [effort for effort in self.efforts if effort not in EFFORTS]
        if unknown or not self.efforts or len(set(self.efforts)) < len(self.efforts):
            raise RunError(
                f"efforts: expected some of {', '.join(EFFORTS)}, got {', '.join(self.efforts) or 'none'}. "
                "Pass one or more, each once."
            )
        for name, least in (("max_new_tokens", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise RunError(f"{name}: expected at least {least}, got {getattr(self, name)}. Pass a larger number.")

    @property
    def bos(self) -> bool:
        return self.template == "plain"

    def manifest(self) -> dict[str, object]:
        efforts = list(self.efforts) if self.template == "harmony" else []
        plain = asdict(replace(self, interventions=()))
        return {
            **plain,
            "efforts": efforts,
            "bos": self.bos,
            "interventions": describe_interventions(self.interventions),
        }


def describe_interventions(items: Sequence[Intervention]) -> dict[str, object]:
    """The interventions as in their file, large tensors by name, and a hash of everything."""
    entries = to_json(items, {})["interventions"]
    return {"items": entries, "hash": fingerprint(to_json(items)) if items else None}


def settings_for(
    chat_template: str | None,
    template: str | None = None,
    efforts: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    **others: Any,
) -> Settings:
    """Settings that suit a model: chats with answers if it has a chat template, else bare text without answers.

    What is given wins over what suits. Raises RunError for efforts in plain text, where they would do nothing.
    """
    template = template or ("plain" if chat_template is None else "harmony")
    if template == "plain" and efforts is not None:
        given = ", ".join(efforts) or "an empty list"
        raise RunError(f"efforts: expected none in plain text, got {given}. Drop them, or use harmony.")
    if max_new_tokens is None:
        max_new_tokens = 0 if template == "plain" else Settings.max_new_tokens
    return Settings(template, EFFORTS if efforts is None else tuple(efforts), max_new_tokens, **others)


@dataclass(frozen=True)
class Document:
    """One sequence to run: a prompt as the model reads it. `effort` is None in plain text."""

    doc_id: str
    group_id: str
    topic: str
    lang: str
    effort: str | None
    ids: tuple[int, ...]
    script: str
    split: str


def choose_prompts(prompts: Iterable[Prompt], limit: int | None = None) -> list[Prompt]:
    """The prompts a study uses: Japanese and English in standard script, parallel or reasoning, whole groups.

    `limit` keeps that many groups, evenly spread over the file, so that a short run still sees every topic.
    Raises PromptError when nothing is left.
    """
    usable = [p for p in prompts if p.kind in STUDIED_KINDS and p.lang in LANGUAGES and p.script == "std"]
    groups = list(dict.fromkeys(prompt.group_id for prompt in usable))
    if limit is not None and limit < 1:
        raise PromptError(f"limit: expected at least 1 group, got {limit}. Pass a larger number.")
    if limit is not None and limit < len(groups):
        groups = [groups[place * len(groups) // limit] for place in range(limit)]
    chosen = set(groups)
    if not chosen:
        raise PromptError("prompts: expected ja or en rows of kind parallel or reasoning in script std, got none.")
    return [prompt for prompt in usable if prompt.group_id in chosen]


def plan_documents(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, settings: Settings, chat_template: str | None = None
) -> list[Document]:
    """Every prompt at every effort: efforts apart, then by length, so that what runs together is of similar length.

    `chat_template` is the checkpoint's own; without one chats are rendered as the released models' template does.
    """
    if settings.template == "plain":
        documents = [
            _document(prompt, None, [tokenizer.bos_id, *tokenizer.encode_literal(prompt.text)]) for prompt in prompts
        ]
    else:
        documents = [
            _document(prompt, effort, _chat_ids(prompt, effort, tokenizer, settings.date, chat_template))
            for effort in settings.efforts
            for prompt in prompts
        ]
        _check_efforts(documents, settings.efforts)
    ranks = {effort: rank for rank, effort in enumerate((None, *settings.efforts))}
    return sorted(documents, key=lambda document: (ranks[document.effort], len(document.ids)))


def _check_efforts(documents: Sequence[Document], efforts: Sequence[str]) -> None:
    """Raises ConfigError when two efforts render alike for every prompt: one would be compared with itself."""
    rendered = {effort: [doc.ids for doc in documents if doc.effort == effort] for effort in efforts}
    for place, effort in enumerate(efforts):
        for other in efforts[place + 1 :]:
            if rendered[effort] == rendered[other]:
                raise ConfigError(
                    f"efforts: expected a chat template that tells {effort} from {other}, got the same tokens for "
                    f"both. Pass --efforts {effort}."
                )


def _document(prompt: Prompt, effort: str | None, ids: Sequence[int]) -> Document:
    name = prompt.doc_id if effort is None else f"{prompt.doc_id}-{effort}"
    return Document(name, prompt.group_id, prompt.topic, prompt.lang, effort, tuple(ids), prompt.script, prompt.split)


def _chat_ids(prompt: Prompt, effort: str, tokenizer: Tokenizer, date: str, template: str | None) -> list[int]:
    return render_tokens([Message("user", prompt.text)], tokenizer, template=template, effort=effort, date=date)


def fingerprint(values: object) -> str:
    """SHA-256 of a value as canonical JSON."""
    text = json.dumps(values, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
