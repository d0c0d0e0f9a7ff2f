"""Rows of one batch under interventions of their own: each is what it is alone, whatever the others are under.

Without padding the model gives a row the same bits in any batch, with `reference` experts or none. Padding takes
attention down another path, and `sorted` multiplies the tokens of an expert together: there the last bits of a row
depend on its neighbours, intervened on or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from closeness import assert_near
from conftest import QWEN3_MOE
from torch import Tensor

from workbench.errors import InterventionError
from workbench.experiments.identity import describe_interventions
from workbench.interventions import (
    AddVector,
    BiasRouter,
    ForceExperts,
    FreezeRouting,
    Intervention,
    Interventions,
    KnockOut,
    PatchActivations,
    PerRow,
    Reweight,
    ScaleExperts,
    SetExpertOutput,
    SteerRouter,
    SwapRouting,
    Where,
)
from workbench.models import Llama, Qwen3Moe, build_model, init_weights

Row = Sequence[Intervention] | Interventions | None


@pytest.fixture
def exact() -> Qwen3Moe:
    """Whose rows have the same bits in every batch."""
    return init_weights(build_model(QWEN3_MOE, moe_impl="reference"), seed=1, std=0.2)  # type: ignore[return-value]


@pytest.fixture
def prompts() -> Tensor:
    """Seven prompts of nine tokens [batch pos]."""
    return torch.randint(5, 60, (7, 9), generator=torch.Generator().manual_seed(4))


def padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The last 4 to 9 tokens of each behind padding, and the mask."""
    lengths = torch.tensor([9, 6, 4, 9, 5, 7, 8])
    mask = (torch.arange(9)[None] >= 9 - lengths[:, None]).long()
    return torch.where(mask == 1, tokens, 4), mask


def rows_of(model: Qwen3Moe, prompts: Tensor) -> list[Row]:
    """Every form a row can have, and kinds that look at all they are given."""
    _, cache = model.run_with_cache(prompts[6:].flip(1))
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return [
        [KnockOut(experts=(0, 1), mode="reroute"), SteerRouter(experts=(5,), form="soft", strength=3.0)],
        None,
        [AddVector(vector=vector, where=Where(positions=(1, -1))), SteerRouter(experts=(2,), form="soft")],
        [],
        Interventions([FreezeRouting.from_cache(cache)]),
        Interventions(
            [
                ScaleExperts(experts=(0, 1, 2, 3), factor=0.0, where=Where(langs=("ja",), phase="decode")),
                SetExpertOutput(experts=(4, 5), value=vector, where=Where(segments=("user",))),
            ],
            label=lambda ids: ["user" if i % 2 else "final" for i in range(len(ids))],
            langs=["ja"],
        ),
        [PatchActivations.from_cache({"blocks.0.hook_resid_mid": cache["resid_mid", 0]})],
    ]


@torch.no_grad()
def test_every_row_has_the_bits_it_has_alone(exact: Qwen3Moe, prompts: Tensor) -> None:
    rows = rows_of(exact, prompts)
    plain = exact(prompts)
    names = [name for name in exact.hook_dict if name.endswith(("resid_post", "expert_ids", "routing_weights"))]
    changed, cache = exact.run_with_cache(prompts, names_filter=names, interventions=PerRow(rows))
    for number, row in enumerate(rows):
        own, found = exact.run_with_cache(prompts[number : number + 1], names_filter=names, interventions=row or ())
        assert torch.equal(changed[number], own[0]), number
        assert torch.equal(changed[number], plain[number]) == (not row), "only rows that have some are changed"
        for name in names:
            assert torch.equal(cache[name][number], found[name][0]), name
    assert torch.equal(exact(prompts), plain)


@torch.no_grad()
def test_every_row_writes_what_it_writes_alone(exact: Qwen3Moe, prompts: Tensor) -> None:
    rows = rows_of(exact, prompts)
    write = partial(exact.generate, max_new_tokens=6, stop_ids=(), record=["router_logits"])
    together = write(prompts, interventions=PerRow(rows))
    for number, row in enumerate(rows):
        own = write(prompts[number : number + 1], interventions=row or ())
        assert torch.equal(together.tokens[number], own.tokens[0])
        for name, values in own.record.activations.items():
            # one token alone is a product of a matrix and a vector, which rounds by itself
            found, kept = together.record.activations[name][number], values[0].isfinite()  # -inf: knocked out
            assert torch.equal(found.isfinite(), kept)
            assert_near(found[kept], values[0][kept])


@torch.no_grad()
@pytest.mark.parametrize("name", ["moe", "exact"])
def test_padded_rows_and_sorted_experts_agree_to_rounding(
    request: pytest.FixtureRequest, name: str, prompts: Tensor
) -> None:
    model = request.getfixturevalue(name)
    rows, (tokens, mask) = rows_of(model, prompts), padded(prompts)
    changed = model(tokens, mask, interventions=PerRow(rows))
    for number, row in enumerate(rows):
        real = mask[number].bool()
        own = model(tokens[number, real][None], interventions=row or ())[0]
        assert_near(changed[number, real], own)


@torch.no_grad()
def test_a_row_keeps_its_bits_whatever_the_others_are_under(exact: Qwen3Moe, prompts: Tensor) -> None:
    first = [BiasRouter(bias=torch.arange(8.0)), Reweight(experts=(7,), factor=3.0)]
    others: list[Row] = [None, [KnockOut(experts=(7, 6), mode="reroute")], [ForceExperts(experts=(0,))]]
    found = [exact(prompts, interventions=PerRow([first, *[other] * 6]))[0] for other in others]
    assert all(torch.equal(found[0], one) for one in found[1:])


@torch.no_grad()
def test_blocks_nest_and_meet_only_in_their_row(exact: Qwen3Moe, prompts: Tensor) -> None:
    freeze = FreezeRouting.from_cache(exact.run_with_cache(prompts[:1])[1])
    gone = KnockOut(experts=(1,), mode="reroute")
    one, other = PerRow([[freeze], *[None] * 6]), PerRow([None, [gone], *[None] * 5])
    with exact.intervene(one), exact.intervene(other):
        nested = exact(prompts)
    assert torch.equal(nested, exact(prompts, interventions=PerRow([[freeze], [gone], *[None] * 5])))
    message = "knock_out that cannot, since freeze_routing decides"
    with exact.intervene(one), pytest.raises(InterventionError, match=message):
        exact(prompts, interventions=[gone])
    with exact.intervene(gone), pytest.raises(InterventionError, match=message):
        exact(prompts, interventions=one)
    with exact.intervene(other):
        assert [block["row"] for block in describe_interventions(exact)] == [1]
    assert not exact.batches
    assert not any(point.fwd_hooks for point in exact.hook_dict.values())


@torch.no_grad()
def test_languages_and_prompts_are_told_by_row(llama: Llama, tokens: Tensor) -> None:
    vector = torch.ones(32)
    ja = [AddVector(vector=vector, where=Where(langs=("ja",)))]
    written = [AddVector(vector=vector, where=Where(phase="decode"))]
    found = llama(tokens, interventions=PerRow([ja, ja], langs=["ja", "en"]))
    assert torch.equal(found[0], llama(tokens, interventions=[AddVector(vector=vector)])[0])
    assert torch.equal(found[1], llama(tokens)[1])
    found = llama(tokens, interventions=PerRow([written, written], n_prompt=[7, 3]))
    assert torch.equal(found, llama(tokens, interventions=Interventions(written, n_prompt=[7, 3])))
    with pytest.raises(InterventionError, match="langs: expected one for each of 1 rows, got none"):
        llama(tokens, interventions=PerRow([ja, None]))


def test_gradients_pass_rows_by_themselves(llama: Llama, tokens: Tensor) -> None:
    def gradient(interventions: object) -> Tensor:
        found: list[Tensor] = []

        def keep(x: Tensor, hook: object) -> Tensor:
            found.append(x.detach().requires_grad_())
            return found[0]

        logits = llama.run_with_hooks(tokens, fwd_hooks=[("hook_embed", keep)], interventions=interventions)
        return torch.autograd.grad(logits[:, -1].square().sum(), found[0])[0]

    change = [AddVector(vector=torch.ones(32))]
    mixed = gradient(PerRow([change, None]))
    assert torch.equal(mixed[0], gradient(change)[0])
    assert torch.equal(mixed[1], gradient(())[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerRow([]), "PerRow: expected a list with an entry for each row"),
        (lambda: PerRow({0: []}), "PerRow: expected a list with an entry for each row"),
        (lambda: PerRow([None, [3]]), "row 1: interventions: expected values such as KnockOut"),
        (lambda: PerRow([PerRow([None])]), "row 0: expected a list of interventions, got PerRow"),
        (lambda: PerRow([None, None], langs=["ja"]), "langs: expected one for each of 2 rows, got 1"),
        (lambda: PerRow([None], n_prompt=[1, 2]), "n_prompt: expected one for each of 1 rows, got 2"),
    ],
)
def test_what_is_no_row_is_named(make: object, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        make()  # type: ignore[operator]


def test_what_does_not_fit_a_row_is_named(moe: Qwen3Moe, tokens: Tensor) -> None:
    with pytest.raises(InterventionError, match="PerRow: expected 3 rows in the batch, got 2"):
        moe(tokens, interventions=PerRow([None, None, [KnockOut(experts=(1,), mode="drop")]]))
    with pytest.raises(InterventionError, match="swap_routing: expected 2 rows, got 1"):
        moe(tokens, interventions=PerRow([[SwapRouting(rows=(1, 0))], None]))
    with pytest.raises(InterventionError, match="knock_out experts: expected 0 to 7, got 8"):
        PerRow([None, [KnockOut(experts=(8,), mode="drop")]]).check(moe)
    two = FreezeRouting.from_cache(moe.run_with_cache(tokens)[1])
    with pytest.raises(InterventionError, match="expected a recording of 1 or 1 rows, as are running, got 2"):
        moe(tokens, interventions=PerRow([[two], None]))
    assert not moe.batches
