"""What an experiment measures: functions of the logits [batch pos d_vocab] that give one number per row [batch].

Any callable of that shape will do. The ones here look at one position only and say so in `pos`, so that a sweep need
not unembed the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.errors import ShapeError
from workbench.models.layers import wide

Metric = Callable[[Tensor], Tensor]  # [batch pos d_vocab] -> [batch]
Ids = int | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class TokenMetric:
    """A metric of the logits at one position: `score` takes them as [batch d_vocab] and returns [batch].

    `arguments` are plain JSON values that say, beside the name, what is measured.
    """

    name: str
    score: Callable[[Tensor], Tensor]
    pos: int = -1
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, logits: Tensor) -> Tensor:  # [batch pos d_vocab] -> [batch]
        return self.score(logits[:, self.column(logits.shape[1])])

    def column(self, n_pos: int) -> int:
        """`pos` counted from the start. Raises ShapeError when the prompts have no such column."""
        return column(self.pos, n_pos)


def logit_difference(correct: Ids, wrong: Ids, pos: int = -1) -> TokenMetric:
    """Logit of `correct` minus logit of `wrong`, each one token id, or one per row [batch]."""
    return TokenMetric(
        "logit_difference", lambda logits: wide(pick(logits, correct)) - wide(pick(logits, wrong)), pos,
        {"correct": _plain(correct), "wrong": _plain(wrong)},
    )  # fmt: skip


def log_probability(correct: Ids, pos: int = -1) -> TokenMetric:
    """Log-probability in nats of one token id, or of one per row [batch]."""
    return TokenMetric(
        "log_probability", lambda logits: pick(wide(logits).log_softmax(-1), correct), pos,
        {"correct": _plain(correct)},
    )  # fmt: skip


def probability(correct: Ids, pos: int = -1) -> TokenMetric:
    """Probability of one token id, or of one per row [batch]."""
    return TokenMetric(
        "probability", lambda logits: pick(wide(logits).softmax(-1), correct), pos, {"correct": _plain(correct)}
    )


def kl(reference: Tensor, pos: int = -1) -> TokenMetric:
    """KL(reference || run) in nats of the next-token distributions at `pos`.

    `reference` are the logits [batch pos d_vocab] of the run to compare with, or those at `pos` alone [batch d_vocab].
    """
    at = reference[:, column(pos, reference.shape[1])] if reference.ndim == 3 else reference
    target = at.float().log_softmax(-1)  # [batch d_vocab]

    def score(logits: Tensor) -> Tensor:
        found, aim = logits.float().log_softmax(-1), target.to(logits.device)
        if found.shape != aim.shape:
            raise ShapeError(f"kl: expected logits {tuple(aim.shape)} like the reference's, got {tuple(found.shape)}.")
        return (aim.exp() * (aim - found)).sum(-1)

    aim_digest = hashlib.sha256(target.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
    return TokenMetric("kl", score, pos, {"reference": aim_digest})


def column(pos: int, n_pos: int) -> int:
    """A column counted from the start; negative ones count from the end. Raises ShapeError when there is none."""
    if not -n_pos <= pos < n_pos:
        raise ShapeError(f"pos: expected a column from {-n_pos} to {n_pos - 1}, got {pos}. Count in tokens.")
    return pos % n_pos


def pick(values: Tensor, ids: Ids) -> Tensor:  # [batch d_vocab] -> [batch]
    """Each row's value at its own id. Raises ShapeError when the ids do not fit the rows or the vocabulary."""
    chosen = torch.as_tensor(ids, device=values.device)
    if chosen.ndim > 1 or (chosen.ndim == 1 and chosen.shape[0] != values.shape[0]):
        raise ShapeError(f"token ids: expected one, or one per row [{values.shape[0]}], got {tuple(chosen.shape)}.")
    if chosen.is_floating_point() or not 0 <= int(chosen.min()) <= int(chosen.max()) < values.shape[-1]:
        raise ShapeError(f"token ids: expected integers from 0 to {values.shape[-1] - 1}, got {chosen.tolist()}.")
    return values.gather(-1, chosen.expand(values.shape[0])[:, None])[:, 0]


def score_rows(metric: Metric, logits: Tensor) -> Tensor:  # [batch pos d_vocab] -> [batch]
    """`metric(logits)`, checked. Raises ShapeError when it does not give one number per row."""
    values = metric(logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(f"metric: expected one number per row [{logits.shape[0]}], got {got}. Do not average rows.")
    return values


def _plain(ids: Ids) -> int | list[int]:
    found: int | list[int] = torch.as_tensor(ids).tolist()
    return found


def metric_name(metric: Any) -> str:
    return str(getattr(metric, "name", None) or getattr(metric, "__name__", type(metric).__name__))


def recovered(value: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """How far `value` has moved from `base` (0) to `target` (1), element by element; NaN where those two are equal."""
    gap = target - base
    return torch.where(gap == 0, torch.nan, (value - base) / gap)
