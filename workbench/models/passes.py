"""Forward passes that continue one cache: over a prompt in chunks, then one position at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.models.cache import KVCache
from workbench.models.recording import Recorder

if TYPE_CHECKING:
    from workbench.models.llama import Llama


class Passes:
    """What `generate` runs, and the recorder that is told of each pass; `logits()` are those of the last one."""

    def __init__(self, model: Llama, cache: KVCache, recorder: Recorder | None) -> None:
        self.model, self.cache, self.recorder = model, cache, recorder
        self._last = torch.empty(0)  # [batch 1 d_model], normalized

    def prefill(self, tokens: Tensor, mask: Tensor | None, chunk: int) -> None:  # [batch pos]
        for start in range(0, tokens.shape[1], chunk):
            part = slice(start, start + chunk)
            self._run(tokens[:, part], None if mask is None else mask[:, part])

    def decode(self, tokens: Tensor, kept: Tensor) -> None:
        """One more token of each row [batch 1]; kept bool [batch], False where it is padding."""
        self._run(tokens, None if kept.all() else kept[:, None].long())

    def logits(self) -> Tensor:  # float32 [batch d_vocab] on the CPU
        return self.model.unembed(self._last)[:, -1].float().cpu()

    def _run(self, tokens: Tensor, mask: Tensor | None) -> None:
        resid = self.model(tokens, mask, cache=self.cache, stop_at_layer=self.model.cfg.n_layers)
        normalized = self.model.ln_final(resid)  # of every column, as its hook points have it in any pass
        if self.recorder is not None:
            self.recorder.step(tokens.shape[1])
        self._last = normalized[:, -1:]
