"""Long experiments: a killed call continues with what is missing, and changed settings are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from workbench.errors import RunError, ShapeError
from workbench.experiments import sweeps
from workbench.experiments.attribution import attribution_patching
from workbench.experiments.contrasts import Contrast
from workbench.experiments.edges import edge_attribution, path_patching
from workbench.experiments.expert_controls import expert_controls, find_expert
from workbench.experiments.metrics import logit_difference
from workbench.experiments.neuron_ablation import ablate_neurons
from workbench.experiments.pairs import Pairs
from workbench.experiments.result import Result
from workbench.experiments.steering import evaluate_steering, log_odds, steering_vectors
from workbench.interventions import KnockOut, Where
from workbench.models import Qwen3Moe

METRIC = logit_difference(40, 50)
PATHS = [["embed", "logits"], ["head 0.1", "q 2.0"], ["head 0.1", "v 1.0", "logits"]]
SEQUENCES = [[7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18]]
NEURONS = pl.DataFrame({"layer": [1, 0], "expert": [None, 2], "neuron": [3, 1]})


def paths(model: Qwen3Moe, tokens: Tensor, **options: Any) -> Result:
    made = {"paths": PATHS, "metric": METRIC, "rows": 2, **options}
    return path_patching(model, Pairs(tokens, tokens.flip(1)), **made)


def edges(model: Qwen3Moe, tokens: Tensor, **options: Any) -> Result:
    made = {"metric": METRIC, "to": ("k", "logits"), "exact_sample": 4, "rows": 2, **options}
    return edge_attribution(model, Pairs(tokens, tokens.flip(1)), **made)


def attribution(model: Qwen3Moe, tokens: Tensor, **options: Any) -> Result:
    made = {"metric": METRIC, "kinds": ["head", "expert"], "exact_sample": 3, "rows": 2, **options}
    return attribution_patching(model, Pairs(tokens, tokens.flip(1)), **made)


def controls(model: Qwen3Moe, tokens: Tensor, **options: Any) -> Result:
    made = {"metric": METRIC, "n_draws": 9, "n_directions": 3, "rows": 2, **options}
    return expert_controls(model, Pairs(tokens, tokens.flip(1)), layer=2, expert=1, pos=3, **made)


def steering(model: Qwen3Moe, tokens: Tensor, scale: float = 1.0, **options: Any) -> Result:
    contrast = Contrast("made", [[20, 21, 22]], [[23, 24, 25]], [[1]], [[1]])
    vectors = steering_vectors(model, contrast)
    made = replace(vectors, vectors={layer: scale * vector for layer, vector in vectors.vectors.items()})
    given = {"prompts": SEQUENCES, "outcome": log_odds(40, 50), "layers": [1], "n_random": 1, "batch_size": 2}
    return evaluate_steering(model, made, **{**given, **options})


def neurons(model: Qwen3Moe, tokens: Tensor, **options: Any) -> Result:
    given = {"neurons": NEURONS, "sequences": SEQUENCES, "langs": ["ja", "en", "ja"], "n_random": 1, "batch_size": 2}
    return ablate_neurons(model, **{**given, **options})


CHANGES: dict[Callable[..., Result], dict[str, dict[str, Any]]] = {
    paths: {"metric_arguments.wrong": {"metric": logit_difference(40, 51)}, "paths": {"paths": PATHS[::-1]}},
    edges: {"seed": {"seed": 1}, "exact_sample": {"exact_sample": 3}, "from": {"from_": ("embed", "expert")},
            "metric_arguments.wrong": {"metric": logit_difference(40, 51)}},
    attribution: {"seed": {"seed": 1}, "kinds": {"kinds": ["head"]},
                  "metric_arguments.correct": {"metric": logit_difference(41, 50)}},
    controls: {"seed": {"seed": 1}, "n_directions": {"n_directions": 2}, "judged": {"judged": ["0", "1"]}},
    steering: {"prompts": {"prompts": [[7, 8, 9, 10], [11, 12, 14], [14, 15, 16, 17, 18]]},
               "outcome_arguments.token": {"outcome": log_odds(41, 50)}, "vectors.1": {"scale": 2.0},
               "where": {"where": Where(positions=(-1,))}, "scales": {"scales": (-1.0, 0.5)}},
    neurons: {"neurons": {"neurons": NEURONS.with_columns(neuron=pl.Series([3, 2]))}, "langs": {"langs": ["ja"] * 3},
              "sequences": {"sequences": [[7, 8, 9, 10], [11, 12], [14, 15, 16, 17, 18]]}, "seed": {"seed": 1}},
}  # fmt: skip
EXPERIMENTS = pytest.mark.parametrize("run", list(CHANGES), ids=lambda run: run.__name__)


class Writes:
    """Counts the batches that go to disk, and kills the process, as it were, when one more than `most` would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.most, self.real = 0, 1000, sweeps.atomic
        monkeypatch.setattr(sweeps, "atomic", self)

    @contextmanager
    def __call__(self, path: Path) -> Iterator[Any]:
        if self.count == self.most:
            raise KeyboardInterrupt
        self.count += 1
        with self.real(path) as file:
            yield file


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    return Writes(monkeypatch)


@EXPERIMENTS
def test_a_killed_call_continues(
    moe: Qwen3Moe, tokens: Tensor, tmp_path: Path, writes: Writes, run: Callable[..., Result]
) -> None:
    expected = run(moe, tokens, progress=False)
    assert writes.count == 0
    run(moe, tokens, out=tmp_path / "whole", progress=False)
    n_batches, writes.count = writes.count, 0
    assert n_batches >= 3
    writes.most = n_batches - 1
    with pytest.raises(KeyboardInterrupt):
        run(moe, tokens, out=tmp_path / "killed", progress=False)
    writes.count, writes.most = 0, 1000
    found = run(moe, tokens, out=tmp_path / "killed", progress=False)
    assert writes.count == 1, "all batches but the last were on disk"
    assert found.frame.equals(expected.frame)
    assert found.settings == expected.settings
    again = run(moe, tokens, out=tmp_path / "killed", progress=False)
    assert writes.count == 1, "a finished one is opened, not run"
    assert again.frame.equals(found.frame)
    left = {entry.name for entry in (tmp_path / "killed").iterdir() if entry.name[0] != "."}
    assert left == {"result.parquet", "settings.json"}


@EXPERIMENTS
def test_changed_settings_are_refused(
    moe: Qwen3Moe, tokens: Tensor, tmp_path: Path, writes: Writes, run: Callable[..., Result]
) -> None:
    writes.most = 1
    with pytest.raises(KeyboardInterrupt):
        run(moe, tokens, out=tmp_path, progress=False)
    for named, options in CHANGES[run].items():
        with pytest.raises(RunError, match=rf"settings\.{named}"):
            run(moe, tokens, **options, out=tmp_path, progress=False)
    with moe.intervene(KnockOut(experts=(3,), mode="drop")), pytest.raises(RunError, match=r"settings\.interventions"):
        run(moe, tokens, out=tmp_path, progress=False)


@EXPERIMENTS
def test_a_long_one_shows_progress(
    moe: Qwen3Moe, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result]
) -> None:
    shown: list[bool] = []
    monkeypatch.setattr(sweeps, "tqdm", lambda todo, *_, disable, **__: shown.append(not disable) or todo)
    run(moe, tokens)
    run(moe, tokens, progress=False)
    assert shown == [True] * (len(shown) // 2) + [False] * (len(shown) // 2)


def test_a_search_for_an_expert_continues(moe: Qwen3Moe, tmp_path: Path, writes: Writes) -> None:
    clean = torch.randint(5, 60, (5, 7), generator=torch.Generator().manual_seed(0))

    def run(out: Path | None = None) -> Result:
        return find_expert(moe, Pairs(clean, clean.roll(1, 1)), METRIC, 3, min_active=0.0, n_draws=9, n_directions=3,
                           out=out, progress=False)  # fmt: skip

    expected = run()
    writes.most = 1  # the search is one batch here
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    writes.count, writes.most = 0, 1000
    assert run(tmp_path).frame.equals(expected.frame)
    assert writes.count == 1, "the controls"


def test_every_sequence_has_a_language(moe: Qwen3Moe, tokens: Tensor) -> None:
    with pytest.raises(ShapeError, match="langs: expected one for each of 3 sequences, got 2"):
        neurons(moe, tokens, langs=["ja", "en"])
