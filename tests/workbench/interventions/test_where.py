"""Where an intervention acts: the same tokens whether padded or not, in one pass or while decoding."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_near
from torch import Tensor

from workbench.errors import InterventionError
from workbench.hooks import HookPoint
from workbench.interventions import (
    AddVector,
    Interventions,
    KnockOut,
    PatchActivations,
    PerRow,
    SetActivation,
    Where,
)
from workbench.models import Llama, Qwen3Moe

POINT = "blocks.1.hook_resid_post"


def touched(model: Llama, where: Where, run: object, **known: object) -> list[list[list[bool]]]:
    """For every pass, [batch pos]: which tokens an intervention reached."""
    found: list[Tensor] = []
    mark = SetActivation(value=7.0, point=POINT, where=where)

    def look(x: Tensor, hook: HookPoint) -> None:
        found.append((x == 7.0).all(-1))

    with model.intervene(Interventions([mark], **known)), model.hooks([(POINT, look)]):
        run()  # type: ignore[operator]
    return [mask.tolist() for mask in found]


def padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Row 0 as it is (7 tokens), row 1 with its first 4 tokens behind padding."""
    batch = torch.stack([tokens[0], torch.cat([torch.full((3,), 4), tokens[1, :4]])])
    return batch, torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])


@torch.no_grad()
def test_positions_are_counted_over_tokens_in_every_pass(model: Llama, tokens: Tensor) -> None:
    batch, mask = padded(tokens)

    def run() -> None:
        model.generate(batch, mask, max_new_tokens=4, stop_ids=())

    passes = touched(model, Where(positions=(1, 5, -1)), run)
    assert [i for i, hit in enumerate(passes[0][0]) if hit] == [1, 5, 6]
    assert [i for i, hit in enumerate(passes[0][1]) if hit] == [4, 6], "positions 1 and 3 of the short row"
    assert passes[1:] == [[[False], [False]], [[False], [True]], [[False], [False]]], "its position 5 is written second"


@torch.no_grad()
def test_prefill_and_decode(model: Llama, tokens: Tensor) -> None:
    batch, mask = padded(tokens)

    def run() -> None:
        model.generate(batch, mask, max_new_tokens=3, stop_ids=())

    prefill = touched(model, Where(phase="prefill"), run)
    assert prefill[0] == mask.bool().tolist(), "padding is left alone"
    assert prefill[1:] == [[[False], [False]]] * 2
    decode = touched(model, Where(phase="decode"), run)
    assert not torch.tensor(decode[0]).any()
    assert decode[1:] == [[[True], [True]]] * 2
    whole = touched(model, Where(phase="decode"), lambda: model(batch, mask), n_prompt=[5, 2])
    assert whole[0] == [[False] * 5 + [True] * 2, [False] * 5 + [True] * 2], "told where the prompt ends"


@torch.no_grad()
@pytest.mark.parametrize("where", [Where(), Where(positions=(-1, 5)), Where(phase="decode")])
def test_the_final_norm_is_reached_in_generation_as_in_a_pass(model: Llama, tokens: Tensor, where: Where) -> None:
    """Only the last column is unembedded; which token it holds is known all the same."""
    batch, mask = padded(tokens)
    moved = AddVector(vector=torch.linspace(-9, 9, model.cfg.d_model), point="ln_final.hook_normalized", where=where)
    options = {"max_new_tokens": 4, "stop_ids": (), "prefill_chunk": 5}
    for items in ([moved], PerRow([[moved], [moved]])):
        written = model.generate(batch, mask, interventions=items, **options).continuations()
        for row, n_prompt, ids in zip(tokens, (7, 4), written, strict=True):
            whole = torch.cat([row[:n_prompt], torch.tensor(ids)])[None]
            logits = model(whole, interventions=Interventions([moved], n_prompt=[n_prompt]))
            assert ids == logits[0, n_prompt - 1 : -1].argmax(-1).tolist()
    assert written != model.generate(batch, mask, **options).continuations()


@torch.no_grad()
def test_the_same_values_padded_or_alone_in_one_pass_or_decoding(moe: Qwen3Moe, tokens: Tensor) -> None:
    batch, mask = padded(tokens)
    items = [
        AddVector(vector=torch.ones(32), where=Where(positions=(2, -1, 6), layers=(0, 1))),
        KnockOut(experts=(1, 4), mode="reroute", where=Where(phase="decode")),
    ]
    together = moe.generate(batch, mask, max_new_tokens=6, stop_ids=(), interventions=items).continuations()
    alone = [
        moe.generate(row[None], max_new_tokens=6, stop_ids=(), interventions=items).continuations()[0]
        for row in (tokens[0], tokens[1, :4])
    ]
    assert together == alone
    for row, answer in zip((tokens[0], tokens[1, :4]), alone, strict=True):
        for n_written in range(6):
            ids = torch.tensor([[*row.tolist(), *answer[:n_written]]])
            logits = moe(ids, interventions=Interventions(items, n_prompt=[len(row)]))
            assert int(logits[0, -1].argmax()) == answer[n_written]


@torch.no_grad()
def test_a_new_sequence_starts_anew(llama: Llama, tokens: Tensor) -> None:
    passes = touched(llama, Where(positions=(-1,)), lambda: (llama(tokens), llama(tokens[:, :4])))
    assert [[row.index(True) for row in one] for one in passes] == [[6, 6], [3, 3]]


@torch.no_grad()
def test_segments_follow_the_labels_while_decoding(llama: Llama, tokens: Tensor) -> None:
    def label(ids: list[int]) -> list[str]:
        return ["user" if i < 3 else "analysis" if i < 8 else "final" for i in range(len(ids))]

    batch, mask = padded(tokens)

    def run() -> None:
        llama.generate(batch, mask, max_new_tokens=4, stop_ids=())

    passes = touched(llama, Where(segments=("analysis",)), run, label=label)
    assert passes[0] == [[False] * 3 + [True] * 4, [False] * 6 + [True]]
    assert passes[1:] == [[[True], [True]], [[False], [True]], [[False], [True]]]
    with pytest.raises(InterventionError, match="segments: expected token ids and a way to label them"):
        touched(llama, Where(segments=("final",)), run)


@torch.no_grad()
def test_languages_choose_rows(llama: Llama, tokens: Tensor) -> None:
    where = Where(langs=("ja",), positions=(0,))
    assert touched(llama, where, lambda: llama(tokens), langs=["en", "ja"])[0] == [
        [False] * 7,
        [True] + [False] * 6,
    ]
    with pytest.raises(InterventionError, match="langs: expected one for each of 2 rows, got none"):
        touched(llama, where, lambda: llama(tokens))
    with pytest.raises(InterventionError, match="langs: expected one for each of 2 rows, got 1"):
        touched(llama, where, lambda: llama(tokens), langs=["en"])


@torch.no_grad()
def test_a_patch_from_a_padded_run_fits_an_unpadded_one(llama: Llama, tokens: Tensor) -> None:
    batch, mask = padded(tokens)
    _, cache = llama.run_with_cache(batch, attention_mask=mask, names_filter=POINT)
    patch = PatchActivations.from_cache(cache, mask)
    assert patch.lengths == (7, 4)
    other = tokens.flip(1)
    seen = llama.run_with_cache(other, names_filter=POINT, interventions=[patch])[1][POINT]
    own = llama.run_with_cache(other, names_filter=POINT)[1][POINT]
    assert torch.equal(seen[0], cache[POINT][0])
    assert torch.equal(seen[1, :4], cache[POINT][1, 3:])
    assert torch.equal(seen[1, 4:], own[1, 4:]), "nothing was recorded there"
    with pytest.raises(InterventionError, match="expected a recording of 1 or 3 rows, as are running, got 2"):
        llama(tokens[[0, 1, 0]], interventions=[patch])


@torch.no_grad()
def test_from_the_residual_stream_it_acts_the_same(moe: Qwen3Moe, tokens: Tensor) -> None:
    item = KnockOut(experts=(1,), mode="drop", where=Where(layers=(2,), positions=(-1,)))
    resid = moe(tokens, stop_at_layer=1)
    whole = moe(tokens, interventions=[item])
    assert_near(moe(resid, start_at_layer=1, interventions=[item]), whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Where(segments=("thinking",)), "segments: expected some of bos, .*, got thinking"),
        (lambda: Where(langs=("fr",)), "langs: expected some of ja, en, got fr"),
        (lambda: Where(phase="encode"), "phase: expected prefill, decode or none, got 'encode'"),
        (lambda: Where(layers=("1",)), "layers: expected int values, got '1'"),
        (lambda: Where(positions={"a": 1}), "positions: expected a list"),
    ],
)
def test_places_that_do_not_exist_are_named(make: object, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        make()  # type: ignore[operator]


@torch.no_grad()
def test_caches_that_take_turns_keep_their_own_prompts(model: Llama, tokens: Tensor) -> None:
    long, short = tokens[:1], tokens[1:, :4]

    def run() -> None:
        caches = [model.new_cache(1, 12), model.new_cache(1, 12)]
        for prompt, cache in zip((short, long), caches, strict=True):
            model(prompt, cache=cache)
        for cache in (*caches, *caches):
            model(tokens[:1, :1], cache=cache)

    decode = touched(model, Where(phase="decode"), run)
    assert decode[:2] == [[[False] * 4], [[False] * 7]]
    assert decode[2:] == [[[True]]] * 4
    last = touched(model, Where(positions=(-1, 8)), run)
    assert [i for i, hit in enumerate(last[0][0]) if hit] == [3]
    assert [i for i, hit in enumerate(last[1][0]) if hit] == [6]
    assert last[2:] == [[[False]], [[False]], [[False]], [[True]]], "position 8 of the long one only"


@torch.no_grad()
def test_caches_that_take_turns_keep_their_own_segments(model: Llama, tokens: Tensor) -> None:
    seen: list[list[int]] = []

    def label(ids: list[int]) -> list[str]:
        seen.append(list(ids))
        return ["user"] * len(ids)

    def run() -> None:
        caches = [model.new_cache(1, 12), model.new_cache(1, 12)]
        for row, cache in enumerate(caches):
            model(tokens[row : row + 1, :3], cache=cache)
        with pytest.raises(RuntimeError, match="halfway"), model.hooks([("blocks.2.hook_resid_post", fail)]):
            model(tokens[:1, 5:7], cache=caches[0])
        for row, cache in enumerate(caches):
            model(tokens[row : row + 1, 3:4], cache=cache)

    touched(model, Where(segments=("user",)), run, label=label)
    first, second = tokens.tolist()
    assert seen[-2:] == [first[:4], second[:4]], "not what a failed pass had, nor the other cache's"


def fail(x: Tensor, hook: HookPoint) -> None:
    raise RuntimeError("halfway")


@torch.no_grad()
def test_a_block_that_begins_after_the_prompt_takes_what_the_cache_holds_for_it(model: Llama, tokens: Tensor) -> None:
    cache = model.new_cache(2, 12)
    batch, mask = padded(tokens)
    model(batch, mask, cache=cache)

    def run() -> None:
        model(tokens[:, :1], cache=cache)

    assert touched(model, Where(phase="decode"), run) == [[[True], [True]]]
    assert touched(model, Where(positions=(5,)), run) == [[[False], [True]]], "row 1 holds four tokens and one more"
    with pytest.raises(InterventionError, match="expected to see a sequence from its first token"):
        touched(model, Where(segments=("user",)), run, label=lambda ids: ["user"] * len(ids))
