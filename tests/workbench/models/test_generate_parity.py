"""Greedy continuations equal those of transformers' `generate`, token for token, alone and in padded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity_configs
import pytest
import torch
from torch import Tensor

from workbench.io.hub import BUNDLED, BUNDLED_DIR
from workbench.io.weights import load_model
from workbench.models import Llama

N_NEW = 16


def batch(d_vocab: int, lengths: tuple[int, ...] = (5, 17, 1)) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, padded on the left with id 4."""
    generator, width = torch.Generator().manual_seed(5), max(lengths)
    tokens = torch.randint(5, d_vocab, (len(lengths), width), generator=generator)
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    return tokens.where(mask.bool(), 4), mask


def theirs(hf_model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    return hf_model.generate(
        tokens, attention_mask=mask, do_sample=False, max_new_tokens=N_NEW, eos_token_id=[2, 13], pad_token_id=4
    )


def check(model: Llama, hf_model: Any) -> None:
    tokens, mask = batch(model.cfg.d_vocab)
    expected = theirs(hf_model, tokens, mask)
    out = model.generate(tokens, mask, max_new_tokens=N_NEW, stop_ids=(2, 13))
    assert torch.equal(out.tokens, expected)
    for row, real in zip(tokens, mask.bool(), strict=True):
        alone = row[real][None]
        assert torch.equal(
            model.generate(alone, max_new_tokens=N_NEW, stop_ids=(2, 13)).tokens,
            theirs(hf_model, alone, torch.ones_like(alone)),
        )


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_checkpoints(name: str) -> None:
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_pretrained(BUNDLED_DIR / name, dtype=torch.float32).eval()
    check(load_model(name, dtype="float32"), hf_model)


FAST = ("llama_gqa_6_2_llama3", "moe")
CASES = [
    pytest.param(case, id=case.name, marks=() if case.name in FAST else pytest.mark.slow)
    for case in parity_configs.CASES
]


@pytest.mark.parametrize("case", CASES)
def test_random_checkpoints(case: parity_configs.ParityCase, tmp_path: Path) -> None:
    hf_model = parity_configs.hf_model(case)
    parity_configs.write_checkpoint(hf_model, case, tmp_path)
    check(load_model(tmp_path, dtype="float32"), hf_model)
