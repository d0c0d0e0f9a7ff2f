"""Random requests of every kind, and running them on a scheduler as they come."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from workbench.interventions import (
    AddVector,
    BiasRouter,
    Intervention,
    KnockOut,
    ProjectOut,
    Reweight,
    ScaleActivation,
    ScaleExperts,
    SteerRouter,
    Where,
)
from workbench.models import Llama
from workbench.models.sampling import Sampling
from workbench.serve import Ask, Choice, Scheduler
from workbench.serve.choice import Ended, Written


@dataclass
class Heard:
    """What a choice told."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    routes: list[Any] = field(default_factory=list)
    reason: str = ""
    error: Exception | None = None


def draw_asks(model: Llama, draw: random.Random, n: int) -> list[Ask]:
    has_experts = hasattr(model.cfg, "n_experts")
    return [
        Ask(
            tuple(draw.choices(range(14, model.cfg.d_vocab), k=draw.randint(1, 50))),
            draw.choice([0, 1, 5, 12, 20]),
            _sampling(draw),
            stop_ids=tuple(draw.choices(range(model.cfg.d_vocab), k=draw.choice([0, 40]))),
            items=tuple(draw_items(model, draw)) if draw.random() < 0.6 else (),
            lang="ja",
            logprobs=draw.choice([None, 0, 3]),
            score_prompt=draw.random() < 0.3,
            routing=has_experts and draw.random() < 0.4,
        )
        for _ in range(n)
    ]


def _sampling(draw: random.Random) -> Sampling:
    if draw.random() < 0.4:
        return Sampling()
    return Sampling(
        temperature=draw.choice([0.0, 0.7, 1.5]),
        top_p=draw.choice([1.0, 0.9]),
        top_k=draw.choice([0, 20]),
        repetition_penalty=draw.choice([1.0, 1.3]),
        seed=[draw.randrange(1000)],
        frequency_penalty=draw.choice([0.0, 0.6]),
        presence_penalty=draw.choice([0.0, 0.6]),
    )


def draw_items(model: Llama, draw: random.Random) -> list[Intervention]:
    d_model = model.cfg.d_model
    vector = torch.randn(d_model, generator=torch.Generator().manual_seed(draw.randrange(1000)))
    where = Where(
        layers=draw.choice([None, (1,)]),
        positions=draw.choice([None, None, tuple(range(2, 30, 2)), (-1,)]),
        phase=draw.choice([None, "prefill", "decode"]),
        langs=draw.choice([None, ("ja",)]),
        segments=draw.choice([None, None, ("plain",)]),
    )
    kinds: list[Intervention] = [
        AddVector(vector=vector, scale=0.5, point=draw.choice(["resid_post", "attn_out", "mlp_out"]), where=where),
        ProjectOut(direction=vector, point="resid_mid", where=where),
        ScaleActivation(factor=0.5, point=draw.choice(["z", "ln1.normalized", "q"]), where=where),
    ]
    if hasattr(model.cfg, "n_experts"):
        kinds += [
            KnockOut(experts=(0, 3), mode=draw.choice(["reroute", "drop", "drop_renormalise"]), where=where),
            Reweight(experts=(1, 2), factor=0.3, renormalise=True, where=where),
            ScaleExperts(experts=(4,), factor=2.0, where=where),
            BiasRouter(bias=torch.linspace(-1, 1, model.cfg.n_experts), where=where),
            SteerRouter(experts=(5,), form=draw.choice(["soft", "steermoe"]), where=where),
        ]
    return draw.sample(kinds, k=1)


def follow(scheduler: Scheduler, asks: list[Ask], draw: random.Random | None = None) -> list[Heard]:
    """Run them, at random moments and with readers that fall behind if `draw` is given; stops the scheduler."""
    heard = [Heard() for _ in asks]
    done = threading.Semaphore(0)
    behind = [False] * len(asks)

    def tell(event: Written | Ended) -> None:
        one = heard[event.index]
        if isinstance(event, Ended):
            one.reason, one.error = event.reason, event.error
            done.release()
        else:
            one.ids.append(event.token_id)
            one.logprobs.append(event.logprob)
            behind[event.index] = draw is not None and draw.random() < 0.2

    choices = [
        Choice(ask, tell, index=index, held_up=lambda index=index: behind[index]) for index, ask in enumerate(asks)
    ]
    scheduler.start()
    for choice in choices:
        scheduler.submit([choice])
        if draw is not None and draw.random() < 0.5:
            time.sleep(0.01)
    for _ in asks:
        while not done.acquire(timeout=0.02):
            behind[:] = [False] * len(asks)
            scheduler.wake()
            assert scheduler.is_alive
    scheduler.stop(0)
    for choice, one in zip(choices, heard, strict=True):
        one.prompt_logprobs, one.routes = choice.prompt_logprobs, choice.routes
    return heard
