"""The rows of a batch that is being written: which still run, what each has written, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import ShapeError
from workbench.models.recording import Record
from workbench.models.stopping import TextWatch, ThinkingBudget, check_stop_strings, need_tokenizer

if TYPE_CHECKING:
    from workbench.models.generate import Generation
    from workbench.models.llama import Llama


class Rows:
    """Takes the chosen token of each row, step by step; `running_any` and `last_kept` [batch] tell how it stands."""

    def __init__(
        self,
        model: Llama,
        tokens: Tensor,
        mask: Tensor,
        stop_ids: Sequence[int] | None,
        stop_strings: Sequence[str],
        max_thinking_tokens: int | None,
        pad_id: int,
        on_text: Callable[[int, str], object] | None,
    ) -> None:
        ids = list(model.stop_ids if stop_ids is None else _id_list(stop_ids))
        _check_ids(model, {"stop_ids": ids, "pad_id": [pad_id]})
        self.stop_strings = check_stop_strings(stop_strings)
        self.tokens, self.mask, self.pad_id, self.on_text = tokens.cpu(), mask.cpu(), pad_id, on_text
        self.tokenizer = model.tokenizer
        self._stops = torch.tensor(ids, dtype=torch.long)
        self._running = torch.ones(len(tokens), dtype=torch.bool)
        self._written: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._reasons = ["length"] * len(tokens)
        self._watches = self._make_watches() if self.stop_strings or on_text else []
        self._budgets = self._make_budgets(max_thinking_tokens)

    @property
    def running_any(self) -> bool:
        return bool(self._running.any())

    @property
    def last_kept(self) -> Tensor:
        """bool [batch], False where the last token taken is padding because its row had ended before."""
        return self._kept[-1]

    def take(self, chosen: Tensor) -> Tensor:  # int64 [batch] -> what is written instead, [batch]
        for row, budget in enumerate(self._budgets):
            dictated = budget.dictated()
            if dictated is not None:
                chosen[row] = dictated
        before = self._running
        chosen = torch.where(before, chosen, self.pad_id)
        self._written.append(chosen)
        self._kept.append(before)
        ended = before & torch.isin(chosen, self._stops)
        if self._budgets or self._watches or bool(ended.any()):
            self._follow(chosen.tolist(), before.tolist(), ended.tolist())
        else:
            self._running = before & ~ended
        return chosen

    def generation(self, record: Record, decode: str) -> Generation:
        """What became of the rows."""
        from workbench.models.generate import Generation

        for row, watch in enumerate(self._watches):
            if self._running[row]:
                self._show(row, watch.finish())
        tokens = torch.cat([self.tokens, torch.stack(self._written, dim=1).to(self.tokens.dtype)], dim=1)
        mask = torch.cat([self.mask, torch.stack(self._kept, dim=1).to(self.mask.dtype)], dim=1)
        reasons, stops = tuple(self._reasons), self.stop_strings
        return Generation(tokens, mask, self.tokens.shape[1], reasons, record, self.tokenizer, stops, decode)

    def _follow(self, chosen: list[int], before: list[bool], ended: list[bool]) -> None:
        running = list(before)
        for row in [row for row, runs in enumerate(before) if runs]:
            if self._budgets:
                self._budgets[row].see([chosen[row]])
            reason = "stop_id" if ended[row] else self._read(row, chosen[row])
            if reason:
                running[row], self._reasons[row] = False, reason
                if ended[row] and self._watches:
                    self._show(row, self._watches[row].push(chosen[row]) + self._watches[row].finish())
        self._running = torch.tensor(running)

    def _read(self, row: int, token_id: int) -> str | None:
        if not self._watches:
            return None
        self._show(row, self._watches[row].push(token_id))
        return "stop_string" if self._watches[row].stopped else None

    def _show(self, row: int, text: str) -> None:
        if text and self.on_text is not None:
            self.on_text(row, text)

    def _make_watches(self) -> list[TextWatch]:
        tokenizer = need_tokenizer(self.tokenizer, "stop_strings, on_text")
        after_special = [tokenizer.is_special(last) for last in self.tokens[:, -1].tolist()]
        return [TextWatch(tokenizer.stream(text_start=start), self.stop_strings) for start in after_special]

    def _make_budgets(self, limit: int | None) -> list[ThinkingBudget]:
        if limit is None:
            return []
        if type(limit) is not int or limit < 0:
            raise ShapeError(f"max_thinking_tokens: expected a whole number from 0, or None, got {limit!r}.")
        tokenizer: Any = need_tokenizer(self.tokenizer, "max_thinking_tokens")
        budgets = [ThinkingBudget(tokenizer, limit) for _ in range(len(self.tokens))]
        for budget, ids, kept in zip(budgets, self.tokens, self.mask.bool(), strict=True):
            budget.see(ids[kept].tolist(), written=False)
        return budgets


def _id_list(ids: Sequence[int]) -> Sequence[int]:
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise ShapeError(f"stop_ids: expected a list of token ids, got {ids!r}. Write [{ids!r}].")
    return ids


def _check_ids(model: Llama, given: dict[str, Sequence[int]]) -> None:
    for name, ids in given.items():
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < model.cfg.d_vocab:  # a bool is no id
                raise ShapeError(
                    f"{name}: expected ids from 0 to {model.cfg.d_vocab - 1}, got {token_id!r}. "
                    "Use the tokenizer of this checkpoint."
                )
