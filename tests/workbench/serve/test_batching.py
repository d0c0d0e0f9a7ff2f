"""The promise of the server: whoever runs beside a choice, its answer is that of being served alone, bit for bit."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from serve_mixes import Heard, draw_asks, follow

from workbench.interventions import BiasRouter, SteerRouter
from workbench.models import Llama
from workbench.models.blocks import check_block, decode_block
from workbench.models.sampling import Sampling
from workbench.serve import Ask, Choice, Engine, Limits, Scheduler
from workbench.serve.choice import Ended, Written
from workbench.serve.scheduler import Stopping

LIMITS = Limits(rows=4, running=6, queue=64, prefill_chunk=16, cache_positions=2048)
FREE = 1 << 30


def alone(model: Llama, asks: list[Ask]) -> list[Heard]:
    """One after the other on an engine that serves nothing else meanwhile."""
    engine = Engine(model, LIMITS, FREE)
    return [follow(Scheduler(engine), [ask])[0] for ask in asks]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_a_mix_of_requests_answers_each_as_if_alone(served: Llama, seed: int) -> None:
    draw = random.Random(seed)
    asks = draw_asks(served, draw, n=12)
    mixed = follow(Scheduler(Engine(served, LIMITS, FREE)), asks, draw)
    for ask, got, want in zip(asks, mixed, alone(served, asks), strict=True):
        assert got.ids == want.ids, ask
        assert got.reason == want.reason, ask
        assert got.logprobs == want.logprobs, ask  # floats, compared to the bit
        assert got.prompt_logprobs == want.prompt_logprobs, ask
        assert len(got.routes) == len(want.routes), ask
        for mine, theirs in zip(got.routes, want.routes, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True)), ask


def test_who_waits_is_admitted_when_the_last_that_ran_has_ended(tiny_llama: Llama) -> None:
    """Nobody wakes the scheduler meanwhile: no new request, no reader, no stop."""
    ended: queue.Queue[Ended] = queue.Queue()
    scheduler = Scheduler(Engine(tiny_llama, replace(LIMITS, running=1), FREE))
    scheduler.start()
    scheduler.submit([Choice(Ask(tuple(range(30, 40)), 4), tell_end(ended)) for _ in range(3)])
    try:
        assert [ended.get(timeout=20).reason for _ in range(3)] == ["length"] * 3
    finally:
        scheduler.stop(0)


def test_who_waits_too_long_is_told_so_while_another_keeps_its_place(tiny_llama: Llama) -> None:
    ended: queue.Queue[Ended] = queue.Queue()
    scheduler = Scheduler(Engine(tiny_llama, replace(LIMITS, running=1), FREE))
    scheduler.start()
    scheduler.submit([Choice(Ask(tuple(range(30, 40)), 40), lambda event: None, held_up=lambda: True)])
    scheduler.submit([Choice(Ask(tuple(range(30, 40)), 4), tell_end(ended), seconds=0.3)])
    try:
        assert ended.get(timeout=20).reason == "timeout"
    finally:
        scheduler.stop(0)


def test_a_cache_that_cannot_be_had_ends_its_choice_alone(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_llama, LIMITS, FREE)
    take, refused = engine.pool.take, [True]

    def once_empty(n_positions: int) -> object:
        if refused.pop() if refused else False:
            raise MemoryError("another has it")
        return take(n_positions)

    monkeypatch.setattr(engine.pool, "take", once_empty)
    first, second = follow(Scheduler(engine), [Ask(tuple(range(30, 40)), 4) for _ in range(2)])
    assert (first.reason, type(first.error)) == ("error", MemoryError)
    assert len(second.ids) == 4


def test_when_the_thread_fails_nobody_is_left_waiting(tiny_llama: Llama) -> None:
    def broken(kind: str, n_rows: int, seconds: float) -> None:
        raise RuntimeError("broken")

    ended: queue.Queue[Ended] = queue.Queue()
    scheduler = Scheduler(Engine(tiny_llama, replace(LIMITS, running=1), FREE), on_step=broken)
    scheduler.start()
    scheduler.submit([Choice(Ask(tuple(range(30, 40)), 4), tell_end(ended)) for _ in range(2)])
    assert [ended.get(timeout=20).reason for _ in range(2)] == ["error", "error"]
    assert scheduler.has_failed
    with pytest.raises(Stopping):
        scheduler.submit([Choice(Ask((30, 31), 1), tell_end(ended))])


def tell_end(ended: queue.Queue[Ended]) -> Callable[[Written | Ended], None]:
    return lambda event: ended.put(event) if isinstance(event, Ended) else None


def test_how_a_neighbour_is_intervened_on_moves_no_bit(tiny_moe: Llama) -> None:
    """Two biases may be added up or applied in turn, by what else a layer has to do; alone and beside others alike."""
    draw = torch.Generator().manual_seed(4)
    biases = tuple(BiasRouter(bias=torch.randn(8, generator=draw), scale=0.3) for _ in range(2))
    beside = (SteerRouter(experts=(2,), form="soft"),)
    both = [Ask(tuple(range(30, 45)), 12, items=items, logprobs=0) for items in (biases, beside)]
    mixed = follow(Scheduler(Engine(tiny_moe, LIMITS, FREE)), both)
    for got, want in zip(mixed, alone(tiny_moe, both), strict=True):
        assert got.logprobs == want.logprobs


def test_a_greedy_answer_is_that_of_generate(served: Llama) -> None:
    prompt = tuple(range(20, 60))
    got = follow(Scheduler(Engine(served, LIMITS, FREE)), [Ask(prompt, 12)])[0]
    want = served.generate(torch.tensor([prompt]), max_new_tokens=12, stop_ids=(), prefill_chunk=16)
    assert got.ids == want.continuations()[0]


def test_a_seed_draws_what_generate_draws(served: Llama) -> None:
    prompt = tuple(range(30, 50))
    sampling = Sampling(temperature=1.3, top_k=40, seed=[1234])
    got = follow(Scheduler(Engine(served, LIMITS, FREE)), [Ask(prompt, 10, sampling)])[0]
    want = served.generate(
        torch.tensor([prompt]), max_new_tokens=10, temperature=1.3, top_k=40, seed=[1234], stop_ids=()
    )
    assert got.ids == want.continuations()[0]


@pytest.mark.parametrize("n_rows", [1, 2, 4, 8])  # odd ones hold on some machines; where one does not, it is refused
def test_blocks_of_these_sizes_hold_on_this_machine(served: Llama, n_rows: int) -> None:
    check_block(served, n_rows)


@torch.inference_mode()
def test_a_block_agrees_with_the_plain_forward_pass(served: Llama) -> None:
    prompts = [list(range(20, 20 + n)) for n in (3, 9, 6)]
    caches = []
    for prompt in prompts:
        caches.append(served.new_cache(1, len(prompt) + 1))
        served(torch.tensor([prompt]), cache=caches[-1])
    found = decode_block(served, [7, 8, 9], caches, n_rows=4)
    for row, (prompt, last) in enumerate(zip(prompts, [7, 8, 9], strict=True)):
        want = served(torch.tensor([[*prompt, last]]))[0, -1]
        torch.testing.assert_close(found[row], want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@torch.inference_mode()
def test_a_failed_pass_leaves_its_caches_as_they_were(tiny_moe: Llama) -> None:
    cache = tiny_moe.new_cache(1, 8)
    tiny_moe(torch.tensor([[20, 21, 22]]), cache=cache, stop_at_layer=tiny_moe.cfg.n_layers)

    def fails(x: torch.Tensor, hook: object) -> None:
        raise RuntimeError("broken")

    with (
        tiny_moe.hooks([("ln_final.hook_normalized", fails)]),
        pytest.raises(RuntimeError, match="broken"),
    ):
        decode_block(tiny_moe, [23], [cache], n_rows=4)
    assert cache.n_seen == 3


def test_one_choice_that_fails_takes_no_other_with_it(tiny_moe: Llama) -> None:
    draw = random.Random(7)
    good = [Ask(tuple(draw.choices(range(20, 400), k=9)), 8) for _ in range(3)]
    wild = draw_asks(tiny_moe, random.Random(1), n=1)[0]
    broken = Ask(wild.prompt, 8, items=(overflow(),))
    heard = follow(Scheduler(Engine(tiny_moe, LIMITS, FREE)), [*good, broken])
    assert heard[3].reason == "error"
    assert "finite" in str(heard[3].error)
    assert [one.ids for one in heard[:3]] == [one.ids for one in alone(tiny_moe, good)]


def overflow() -> object:
    from workbench.interventions import ScaleActivation, Where

    return ScaleActivation(factor=1e38, point="ln_final.hook_normalized", where=Where(phase="decode"))


def test_cancelled_choices_free_their_place(tiny_moe: Llama) -> None:
    scheduler = Scheduler(Engine(tiny_moe, LIMITS, FREE))
    scheduler.start()
    ended = threading.Semaphore(0)
    reasons: list[str] = []

    def tell(event: object) -> None:
        if hasattr(event, "reason"):
            reasons.append(event.reason)
            ended.release()

    endless = [Choice(Ask((20, 21), 280), tell, held_up=lambda: True) for _ in range(6)]
    scheduler.submit(endless)
    scheduler.submit([Choice(Ask((20, 21), 3), tell)])
    scheduler.cancel(endless)
    assert all(ended.acquire(timeout=60) for _ in range(7))
    assert sorted(reasons) == ["cancelled"] * 6 + ["length"]
    assert scheduler.engine.pool.n_used == 0
    scheduler.stop(0)
