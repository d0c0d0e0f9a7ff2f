"""Our models as a model of lm-evaluation-harness: registered as "workbench" once this module is imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from workbench.chat import Message, as_day, render
from workbench.errors import ConfigError
from workbench.evals.answers import cut_at, final_text, whole_text
from workbench.evals.languages import item_language
from workbench.evals.scoring import Changes, Pair, Writing, score, write
from workbench.interventions import Intervention, load_interventions
from workbench.models import Llama
from workbench.models.sampling import row_seeds

CHAT_START, FINAL_HEADER = "<|start|>", "<|channel|>final<|message|>"
GENERATION_PROMPT = "<|start|>assistant"
DATE = "2026-01-01"  # of conversations: today's would make every day another prompt
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


@register_model("workbench")
class WorkbenchLM(TemplateLM):
    """A workbench model that answers the harness's requests, under interventions if any are given.

    pretrained: a loaded model, or what `load_model` takes. interventions: values, or a file of them. effort: of
    conversations that the harness renders ("low", "medium", "high"; None leaves the line out); date: of them.

    add_bos: None puts <|startoftext|> before plain text, as models are trained, and none before a conversation; False
    never, as the harness's transformers backend with these checkpoints. A text that begins with it keeps that one.

    answers: "final" judges what stands in the final channel, where until-strings apply, so that thinking is not cut;
    "all" everything written, special tokens left out, as the transformers backend. "auto" is "final" after a
    conversation and "all" after plain text. Without a final message the answer is empty.

    `counts` tells what a reader should know: contexts cut at the left because they were too long, and continuations
    before which the context is tokenised differently than alone.
    """

    def __init__(
        self,
        pretrained: str | Llama,
        interventions: str | Path | Sequence[Intervention] = (),
        batch_size: int | str | None = 32,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        moe_impl: str = "auto",
        effort: str | None = "medium",
        date: str = DATE,
        add_bos: bool | None = None,
        answers: str = "auto",
        score_in_final: bool = True,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.model = _as_model(pretrained, device or "cpu", dtype, moe_impl)
        given = load_interventions(interventions) if isinstance(interventions, str | Path) else tuple(interventions)
        self.changes = Changes(given)
        self.batch_size, self.max_gen_toks = _as_batch_size(batch_size, max_batch_size), max_gen_toks
        self.effort, self.date, self.add_bos = effort, str(as_day(date)), add_bos
        if answers not in ("auto", "final", "all"):
            raise ConfigError(f"answers: expected auto, final or all, got {answers!r}.")
        self.answers, self.score_in_final = answers, score_in_final
        self.max_length = min(max_length or self.model.cfg.n_ctx, self.model.cfg.n_ctx)
        self.seed, self.progress = seed, progress
        self.counts = {"contexts_cut": 0, "boundaries_moved": 0}
        self._device = self.model.device
        self._tokens = self.model.tokenizer

    @property
    def eot_token_id(self) -> int:
        return int(self._tokens.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """<|startoftext|>, before what has no context."""
        return int(self._tokens.bos_id)

    @property
    def tokenizer_name(self) -> str:
        return f"{self._tokens.hash}-{self.effort}-{self.date}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.model.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in Harmony; without `add_generation_prompt` the last message is one to be continued."""
        if not add_generation_prompt:
            *turns, last = chat_history
            opened = Message("assistant", last["content"], channel="final", end="truncated")
            return render([*turns, opened], effort=self.effort, date=self.date, add_generation_prompt=False)
        return render(chat_history, effort=self.effort, date=self.date)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        wanted = self.add_bos if add_special_tokens is None else add_special_tokens
        if wanted is None:
            wanted = not string.startswith(CHAT_START)
        ids = self._tokens.to_tokens(string, bos=False)
        return [self._tokens.bos_id, *ids] if wanted and ids[:1] != [self._tokens.bos_id] else list(ids)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self._pair(request.args[0], request.args[1], language_of(request)) for request in requests]
        found = self._score(pairs, disable_tqdm)
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def _pair(self, context: str, continuation: str, lang: str | None) -> Pair:
        if not continuation:
            raise ConfigError("continuation: expected some text to score, got none. Check the task's choices.")
        if not context:
            after = self.tok_encode(continuation, add_special_tokens=False)
            before = [self.prefix_token_id] if after[0] != self.prefix_token_id else [after.pop(0)]
            return Pair(tuple(before), tuple(after), lang)
        if self.score_in_final and context.endswith(GENERATION_PROMPT) and not continuation.startswith("<|"):
            # scored where the model answers; the tokenizer adds the space that separates words itself
            context, continuation = context + FINAL_HEADER, continuation.removeprefix(" ")
        before, after = self._encode_pair(context, continuation)
        self.counts["boundaries_moved"] += [*before, *after] != self.tok_encode(context + continuation)
        return Pair(tuple(before), tuple(after), lang)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        return self._score([Pair(tuple(before), tuple(after)) for _, before, after in requests], disable_tqdm)

    def _score(self, pairs: Sequence[Pair], disable_tqdm: bool) -> list[tuple[float, bool]]:
        with self._bar("scoring", len(pairs), disable_tqdm) as bar:
            return score(self.model, [self._fit(pair) for pair in pairs], self.changes, self.batch_size, bar.update)

    def _fit(self, pair: Pair) -> Pair:
        """Cut at the left what is too long: the model reads at most `max_length` tokens."""
        surplus = len(pair.context) + len(pair.continuation) - self.max_length - 1
        if surplus <= 0:
            return pair
        self.counts["contexts_cut"] += 1
        if surplus >= len(pair.context):
            raise ConfigError(
                f"continuation: expected at most {self.max_length} tokens, got {len(pair.continuation)}. "
                "Score shorter ones, or raise max_length."
            )
        return Pair(pair.context[surplus:], pair.continuation, pair.lang)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Every token once, with as much context as fits before it; <|startoftext|> before the first."""
        pairs, owner = [], []
        for place, request in enumerate(requests):
            ids = self._tokens.to_tokens(request.args[0], bos=False)
            ids = ids[1:] if ids[:1] == [self.prefix_token_id] else ids
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                before, after = make_disjoint_window(window)
                pairs.append(Pair(tuple(before), tuple(after), language_of(request)))
                owner.append(place)
        totals = [0.0] * len(requests)
        for place, (value, _) in zip(owner, self._score(pairs, disable_tqdm), strict=True):
            totals[place] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr((request.args[1], self._wants_final(request.args[0]))), []).append(place)
        with self._bar("writing", len(requests), disable_tqdm) as bar:
            for places in groups.values():
                found = self._write([requests[place] for place in places], bar.update)
                for place, answer in zip(places, found, strict=True):
                    answers[place] = answer
                    self.cache_hook.add_partial("generate_until", requests[place].args, answer)
        return answers

    def _wants_final(self, context: str) -> bool:
        return self.answers == "final" or (self.answers == "auto" and context.startswith(CHAT_START))

    def _write(self, requests: Sequence[Instance], done: Callable[[int], object]) -> list[str]:
        """Of requests that share their arguments."""
        context, arguments = requests[0].args
        final = self._wants_final(context)
        how, until = self._how(arguments, final)
        prompts = [self._cut(self.tok_encode(request.args[0]), how.max_new_tokens) for request in requests]
        langs = [language_of(request) for request in requests]
        if how.seed is not None:
            how = replace(how, seed=self._seeds([request.args[0] for request in requests]))
        written = write(self.model, prompts, how, self.changes, langs, self.batch_size, done)
        texts = [
            final_text(self._tokens, prompt, ids) if final else whole_text(self._tokens, ids)
            for prompt, ids in zip(prompts, written, strict=True)
        ]
        return [cut_at(text, until) for text in texts]

    def _seeds(self, contexts: Sequence[str]) -> list[int]:
        """A task may ask the same several times, to vote say: each time draws anew, and the same in every run."""
        asked: Counter[str] = Counter()
        seeds = []
        for context in contexts:
            seeds.append(row_seeds(self.seed, asked[context] + 1)[-1])
            asked[context] += 1
        return seeds

    def _how(self, arguments: dict[str, Any], final: bool) -> tuple[Writing, list[str]]:
        given = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        until = [stop for stop in given.pop("until") if stop]
        n_new, sampled = given.pop("max_gen_toks"), given.pop("do_sample")
        chosen = {name: given.pop(name) for name in _SAMPLING if given.get(name) is not None}
        if given:
            raise ConfigError(
                f"generation_kwargs: expected until, max_gen_toks, do_sample, {', '.join(_SAMPLING)}, "
                f"got {', '.join(given)}. Take it out of the task, or set it with --gen-kwargs."
            )
        if not sampled:
            chosen["temperature"] = 0.0
        elif not chosen.get("temperature"):
            chosen["temperature"] = 1.0
        # thinking must not be cut: in a conversation the strings are looked for in the answer, afterwards
        stops = () if final else tuple(until)
        seed = self.seed if sampled else None
        return Writing(int(n_new), seed=seed, stop_strings=stops, **chosen), until

    def _cut(self, prompt: list[int], n_new: int) -> list[int]:
        room = self.max_length - n_new
        if room < 1:
            raise ConfigError(
                f"max_gen_toks: expected fewer than the context's {self.max_length} tokens, got {n_new}. Lower it."
            )
        self.counts["contexts_cut"] += len(prompt) > room
        return prompt[-room:]

    def _bar(self, what: str, total: int, disabled: bool) -> Any:
        return tqdm(total=total, desc=what, unit="item", disable=True if disabled or not self.progress else None)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {
            "model_source": self.model.source,
            "model_dtype": str(self.model.dtype).removeprefix("torch."),
            "moe_impl": self.model.moe_impl,
            "moe_path": self.model.moe_path,
            "attn_impl": self.model.attn_impl,
            "effort": self.effort,
            "date": self.date,
            "add_bos": self.add_bos,
            "answers": self.answers,
            "interventions": [item.kind for item in self.changes.items],
        }


def language_of(request: Instance) -> str | None:
    """The item's own `lang`; else what the task's name says; else None."""
    doc = request.doc if isinstance(request.doc, dict) else {}
    return item_language(doc, request.task_name or "")


def _as_model(given: str | Llama, device: str, dtype: str | None, moe_impl: str) -> Llama:
    from workbench.io.weights import load_model

    if not isinstance(given, str):
        model = given
    else:
        chosen = dtype or ("float32" if device == "cpu" else "auto")
        model = load_model(given, dtype=chosen, device=device, moe_impl=moe_impl)
    if model.tokenizer is None:
        raise ConfigError("model: expected one with a tokenizer, got one without. Load a checkpoint that has it.")
    return model


def _as_batch_size(given: int | str | None, largest: int | None) -> int:
    try:
        size = int(given if given is not None else 32)
    except ValueError:
        raise ConfigError(f"batch_size: expected a number, got {given!r}. Sizes are not found by trial.") from None
    if size < 1:
        raise ConfigError(f"batch_size: expected at least 1, got {size}.")
    return min(size, largest or size)
