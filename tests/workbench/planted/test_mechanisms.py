from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workbench.errors import ConfigError
from workbench.hooks import HookPoint
from workbench.io.saving import save_model
from workbench.io.weights import load_model
from workbench.models import Llama
from workbench.planted.mechanisms import Mechanism, copying_head, deciding_route, writing_mlp

MECHANISMS = {
    "head-llama": lambda: copying_head("llama"),
    "head-moe": lambda: copying_head("qwen3_moe"),
    "neuron": lambda: writing_mlp("llama"),
    "expert": lambda: writing_mlp("qwen3_moe"),
    "route": deciding_route,
}


@pytest.fixture(params=list(MECHANISMS))
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    return MECHANISMS[request.param]()


def difference(mechanism: Mechanism, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = mechanism.model(tokens)[:, -1]
    return logits[:, mechanism.correct] - logits[:, mechanism.wrong]


def test_the_subject_decides_the_answer(mechanism: Mechanism) -> None:
    clean, corrupt = difference(mechanism, mechanism.clean), difference(mechanism, mechanism.corrupt)
    assert (clean > 2).all()
    assert torch.allclose(clean, -corrupt, atol=1e-4), "only one sign differs"
    with torch.no_grad():
        assert (mechanism.model(mechanism.clean)[:, -1].argmax(-1) == mechanism.correct).all()
    changed = (mechanism.clean != mechanism.corrupt).any(0).nonzero().flatten().tolist()
    assert changed == [mechanism.subject_pos]


def test_the_carrying_head_looks_at_the_subject(mechanism: Mechanism) -> None:
    name = f"blocks.{mechanism.head_layer}.attn.hook_pattern"
    with torch.no_grad():
        _, cache = mechanism.model.run_with_cache(mechanism.clean, names_filter=name)
    looks = cache[name][:, :, mechanism.query_pos, mechanism.subject_pos]  # [pair head]
    assert (looks[:, [mechanism.head, mechanism.idle_head]] > 0.99).all()


def test_without_its_writer_there_is_no_answer(mechanism: Mechanism) -> None:
    def silence(x: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        x = x.clone()
        x[:, :, mechanism.head] = 0
        return x

    with mechanism.model.hooks([(f"blocks.{mechanism.head_layer}.attn.hook_z", silence)]):
        assert (difference(mechanism, mechanism.clean) - difference(mechanism, mechanism.corrupt)).abs().max() < 1e-5


def test_routes_are_as_planted() -> None:
    for make, experts in ((writing_mlp, (3, 3)), (deciding_route, (3, 6))):
        mechanism = make()
        name = f"blocks.{mechanism.writer_layer}.mlp.hook_expert_ids"
        for tokens, expert in zip((mechanism.clean, mechanism.corrupt), experts, strict=True):
            with torch.no_grad():
                ids = mechanism.model.run_with_cache(tokens, names_filter=name)[1][name]
            assert (ids[:, -1, 0] == expert).all()
            assert set(ids[:, -1, 1].tolist()).isdisjoint(set(mechanism.experts)), "the other slot has another expert"


def test_the_rest_of_the_model_is_busy(mechanism: Mechanism) -> None:
    with torch.no_grad():
        _, cache = mechanism.model.run_with_cache(mechanism.clean)
    for layer in range(4):
        assert cache["attn_out", layer].abs().max() > 0.02
        assert cache["mlp_out", layer].abs().max() > 0.02


def test_saved_and_loaded_it_is_the_same_model(mechanism: Mechanism, tmp_path: Path) -> None:
    loaded: Llama = load_model(save_model(mechanism.model, tmp_path / "planted"), dtype="float32")
    with torch.no_grad():
        assert torch.equal(loaded(mechanism.clean), mechanism.model(mechanism.clean))


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(ConfigError, match="architecture: expected one of llama, qwen3_moe, got 'gpt2'"):
        copying_head("gpt2")
