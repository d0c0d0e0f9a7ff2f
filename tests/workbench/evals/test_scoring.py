"""Scoring and writing give, for each sequence, what it would give alone."""

from __future__ import annotations

import random

import pytest
import torch

from workbench.errors import ShapeError
from workbench.evals.scoring import Changes, Pair, Writing, score, write
from workbench.interventions import AddVector, Interventions, KnockOut, SetActivation, Where
from workbench.models import Llama


def pairs_of(n: int, seed: int = 0) -> list[Pair]:
    rng = random.Random(seed)
    return [
        Pair(
            tuple(rng.randrange(5, 60) for _ in range(rng.randint(1, 9))),
            tuple(rng.randrange(5, 60) for _ in range(rng.randint(1, 5))),
        )
        for _ in range(n)
    ]


def alone(model: Llama, pair: Pair) -> tuple[float, bool]:
    whole = torch.tensor([[*pair.context, *pair.continuation]])
    log_probs = model(whole)[0].log_softmax(-1)[len(pair.context) - 1 : -1]  # [token d_vocab]
    wanted = torch.tensor(pair.continuation)
    return float(log_probs[torch.arange(len(wanted)), wanted].sum()), bool((log_probs.argmax(-1) == wanted).all())


def close(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]]) -> bool:
    scale = max(abs(value) for value, _ in wanted)
    same = all(abs(a - b) <= 1e-5 * scale for (a, _), (b, _) in zip(found, wanted, strict=True))
    return same and [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_batches_change_nothing(model: Llama) -> None:
    pairs = pairs_of(23)
    told: list[int] = []
    with torch.no_grad():
        wanted = [alone(model, pair) for pair in pairs]
    assert close(score(model, pairs, batch_size=5, done=told.append), wanted)
    assert sum(told) == len(pairs)


def test_choices_that_differ_in_the_last_token_share_a_pass(moe: Llama) -> None:
    context = (7, 8, 9, 10)
    pairs = [Pair(context, (token,)) for token in range(5, 60)]
    passes: list[int] = []
    with moe.hooks([("hook_embed", lambda x, hook: passes.append(len(x)))]):
        found = score(moe, pairs)
    assert passes == [1]
    with torch.no_grad():
        assert close(found, [alone(moe, pair) for pair in pairs])
    assert sum(greedy for _, greedy in found) <= 1
    assert sum(torch.tensor([value for value, _ in found]).exp()) < 1


def test_the_greedy_continuation_is_found_to_be_greedy(model: Llama) -> None:
    prompts = [list(pair.context) for pair in pairs_of(6)]
    written = write(model, prompts, Writing(4, stop_ids=()))
    pairs = [Pair(tuple(prompt), tuple(ids)) for prompt, ids in zip(prompts, written, strict=True)]
    assert all(greedy for _, greedy in score(model, pairs))


def test_writing_equals_each_prompt_alone_sampled_too(model: Llama) -> None:
    prompts = [list(pair.context) for pair in pairs_of(7, seed=3)]
    for how in (Writing(6), Writing(6, temperature=1.0, top_p=0.9, seed=11)):
        together = write(model, prompts, how, batch_size=3)
        assert together == [write(model, [prompt], how)[0] for prompt in prompts]


def test_the_continuation_counts_as_written(moe: Llama) -> None:
    """A change limited to what is written leaves the first token's score, and meets generation where it does."""
    quiet = Changes((SetActivation(value=0.0, point="mlp_out", where=Where(layers=(1,), phase="decode")),))
    first, later = Pair((7, 8, 9), (10,)), Pair((7, 8, 9), (10, 11, 12))
    assert score(moe, [first], quiet) == score(moe, [first])
    assert score(moe, [later], quiet) != score(moe, [later])
    (written,) = write(moe, [[7, 8, 9]], Writing(5, stop_ids=()), quiet)
    assert score(moe, [Pair((7, 8, 9), tuple(written))], quiet)[0][1]


@pytest.mark.parametrize("phase", [None, "decode"])
def test_a_change_of_the_final_norm_is_that_of_a_plain_pass(model: Llama, phase: str | None) -> None:
    moved = AddVector(
        vector=torch.linspace(-3, 3, model.cfg.d_model), point="ln_final.hook_normalized", where=Where(phase=phase)
    )
    pairs = [Pair(tuple(range(5, 9)), (10, 11, 12)), Pair(tuple(range(9, 16)), (20, 21))]
    found = score(model, pairs, Changes((moved,)))
    for pair, one in zip(pairs, found, strict=True):
        with torch.no_grad(), model.intervene(Interventions([moved], n_prompt=[len(pair.context)])):
            assert close([one], [alone(model, pair)])
    assert not close(found, score(model, pairs))


def test_a_change_of_one_language_leaves_the_other_alone(moe: Llama) -> None:
    gone = Changes((KnockOut(experts=(0, 1, 2), mode="reroute", where=Where(langs=("ja",))),))
    pairs = [Pair(pair.context, pair.continuation, lang) for pair in pairs_of(4) for lang in ("ja", "en", None)]
    plain, changed = score(moe, pairs, batch_size=4), score(moe, pairs, gone, batch_size=4)
    for pair, before, after in zip(pairs, plain, changed, strict=True):
        # an expert that loses rows of the batch may round the others' differently
        assert (after[0] == pytest.approx(before[0], rel=1e-5)) == (pair.lang != "ja")


def test_what_is_too_long_is_refused(model: Llama) -> None:
    with pytest.raises(ShapeError, match="expected 1 to 64 tokens"):
        score(model, [Pair(tuple([7] * 65), (8,))])
    with pytest.raises(ShapeError, match="less 10 to write"):
        write(model, [[7] * 60], Writing(10))
