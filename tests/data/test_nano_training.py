"""Training: batches, schedule and losses are right; a few steps learn, repeat bit for bit and can be interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from batches import Example, chat_example, collate, document_example, pool
from muon import Muon, orthogonalised
from recipe import HERE, RECIPES, Recipe, model_config
from train import WARM_UP, Run, losses, make_optimizers, router_loss, schedule

from workbench.io.tokens import Tokenizer
from workbench.models import build_model, init_weights

TOKENIZER = Tokenizer.from_file(HERE / "tokenizer.json")
TINY = Recipe("nano-moe-base", None, 20 * 256, 0.5, 3e-3, 2e-2, batch_tokens=256)
TINY_DENSE = Recipe("nano-dense-base", None, 20 * 256, 0.5, 3e-3, 2e-2, batch_tokens=256)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def test_documents_are_learned_whole() -> None:
    ids, learn_from = document_example(TOKENIZER, 0, 3)
    assert (ids[0], ids[-1], learn_from) == (1, 2, 1)


def test_conversations_are_learned_from_the_thinking_on() -> None:
    ids, learn_from = chat_example(TOKENIZER, 0, 3)
    text = TOKENIZER.to_string(ids[learn_from:])
    assert text.startswith("<|channel|>analysis<|message|>")
    assert text.endswith("<|return|>")
    assert text.count("<|start|>assistant<|channel|>final<|message|>") == 1
    assert TOKENIZER.to_string(ids[:learn_from]).endswith("<|start|>assistant")


def test_collate_shifts_and_masks() -> None:
    batch = collate([Example([1, 5, 6, 2], 2), Example([1, 7], 1)], pad_id=4)
    assert batch.tokens.tolist() == [[1, 5, 6], [1, 4, 4]]
    assert batch.targets.tolist() == [[-1, 6, 2], [7, -1, -1]]
    assert batch.valid.tolist() == [[True, True, True], [True, False, False]]


def test_a_pool_uses_every_example_once_within_the_token_budget() -> None:
    ready, following = pool(TOKENIZER, 1, 100, 0.5, 512)
    again, _ = pool(TOKENIZER, 1, 100, 0.5, 512)
    assert all(batch.tokens.numel() <= 512 for batch in ready)
    assert sum(len(batch.tokens) for batch in ready) == following - 100
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(ready, again, strict=True))


def test_schedule_warms_up_and_decays() -> None:
    assert schedule(0, 1000) == pytest.approx(1 / WARM_UP)
    assert schedule(500, 1000) == 1.0
    assert schedule(850, 1000) == pytest.approx(1 / 2)
    assert schedule(1000, 1000) == pytest.approx(1 / 20)


def test_every_parameter_has_one_optimizer() -> None:
    model = init_weights(build_model(model_config("nano-moe-base", TOKENIZER.d_vocab)), seed=0)
    optimizers = make_optimizers(model)
    owned = [p for o in optimizers.values() for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    assert {p.ndim for group in optimizers["muon"].param_groups for p in group["params"]} == {2}


def test_muon_is_torchs_up_to_the_rounding_of_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((64, 64), (32, 64), (96, 64), (64, 64))]
    mine, theirs = ([w.clone().requires_grad_() for w in start] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.01, "momentum": 0.95}
    optimizers = Muon(mine, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        for w, other in zip(mine, theirs, strict=True):
            w.grad = torch.randn(w.shape, generator=generator)
            other.grad = w.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = [torch.linalg.vector_norm(w - w0) for w, w0 in zip(mine, start, strict=True)]
    apart = [torch.linalg.vector_norm(w - other) for w, other in zip(mine, theirs, strict=True)]
    assert all(gap < 0.02 * step for gap, step in zip(apart, moved, strict=True))


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    for shape in ((3, 32, 64), (3, 64, 32)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert 0.5 < values.min() < values.max() < 1.5


def test_router_loss_is_least_for_even_and_small_logits() -> None:
    valid = torch.ones(2, 8, dtype=torch.bool)
    even = torch.eye(8).repeat(2, 1, 1)  # each token prefers its own expert
    crowded = torch.zeros(2, 8, 8)
    crowded[..., 0] = 1.0
    assert router_loss(even, valid, k=1) < router_loss(crowded, valid, k=1)
    assert router_loss(even, valid, k=1) < router_loss(even + 5, valid, k=1)


def test_router_loss_ignores_padding() -> None:
    logits = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[True, True, True, False, False, False]])
    assert torch.equal(router_loss(logits, valid, 2), router_loss(logits[:, :3], valid[:, :3], 2))


def test_losses_equal_the_whole_model_and_reach_the_router() -> None:
    model = init_weights(build_model(model_config("nano-moe-base", TOKENIZER.d_vocab)), seed=0)
    batch = collate([document_example(TOKENIZER, 0, i) for i in range(3)], pad_id=4)
    loss, router = losses(model, batch)
    logits = model(batch.tokens)
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-1)
    assert torch.allclose(loss, whole, atol=1e-5)
    router.backward()
    assert all(block.mlp.router.weight.grad.abs().sum() > 0 for block in model.blocks)


@pytest.mark.parametrize("recipe", [TINY, TINY_DENSE], ids=["moe", "dense"])
def test_a_few_steps_learn_and_repeat_bit_for_bit(recipe: Recipe, tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run = Run(recipe, tmp_path / name, steps=12)
        stream = run.batches()
        found = [run.train_step(next(stream)) for _ in range(12)]
        runs.append((found, weights(run)))
    assert sum(runs[0][0][-3:]) < sum(runs[0][0][:3]) - 1
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


@pytest.mark.parametrize("stop", ["inside a pool", "between pools", "in the second pool"])
def test_an_interrupted_run_continues_where_it_was(stop: str, tmp_path: Path) -> None:
    n_pool = len(pool(TOKENIZER, TINY.seed, 0, TINY.chat_share, TINY.batch_tokens)[0])
    n_before = {"inside a pool": 2, "between pools": n_pool, "in the second pool": n_pool + 1}[stop]
    straight = Run(TINY, tmp_path, steps=30)
    stream = straight.batches()
    for _ in range(n_before):
        straight.train_step(next(stream))
    straight.save_state()
    resumed = Run(TINY, tmp_path, steps=30)
    assert resumed.step == n_before
    rest = resumed.batches()
    for _ in range(2):
        assert straight.train_step(next(stream)) == resumed.train_step(next(rest))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(straight).items())


def test_a_longer_recipe_continues_a_finished_run(tmp_path: Path) -> None:
    short, longer = replace(TINY_DENSE, tokens=3 * 256), replace(TINY_DENSE, tokens=6 * 256, cycles=2)
    Run(short, tmp_path, None).train()
    continued = Run(longer, tmp_path, None)
    assert (continued.step, continued.steps) == (3, 6)
    continued.train()
    (tmp_path / "straight").mkdir()
    straight = Run(longer, tmp_path / "straight", None)
    straight.train()
    assert all(torch.equal(value, weights(continued)[name]) for name, value in weights(straight).items())


def test_a_thinking_run_starts_from_its_base(tmp_path: Path) -> None:
    base = Run(TINY, tmp_path, steps=1)
    base.train()
    assert (tmp_path / "nano-moe-base" / "model.safetensors").is_file()
    thinking = Run(RECIPES["nano-moe-thinking"], tmp_path, steps=1)
    assert all(torch.equal(value, weights(thinking)[name]) for name, value in weights(base).items())
    assert thinking.step == 0
    assert thinking.next_example > 1_000_000


def test_a_thinking_run_without_its_base_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nano-moe-thinking: expected the finished run of nano-moe-base"):
        Run(RECIPES["nano-moe-thinking"], tmp_path, steps=1)
