"""One model's routers on another's hidden states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from workbench.capture import capture_routing, weights_hash
from workbench.errors import ConfigError
from workbench.experiments.exchange import exchanged_routing
from workbench.experiments.result import Result
from workbench.models import Qwen3Moe, build_model, init_weights

SEQUENCES = [[7, 8, 9, 10], [11, 12, 13]]
NAMES = ["a", "b"]


@pytest.fixture
def other(moe: Qwen3Moe) -> Qwen3Moe:
    return init_weights(build_model(moe.cfg), seed=9, std=0.2)


def own(model: Qwen3Moe) -> pl.DataFrame:
    return capture_routing(model, SEQUENCES).frame(["a"] * 4 + ["b"] * 3, [0, 1, 2, 3, 0, 1, 2])


def test_a_models_own_routers_give_its_own_routing(moe: Qwen3Moe) -> None:
    found = exchanged_routing(moe, moe, NAMES, SEQUENCES).frame.sort("doc_id", "pos", "layer")
    expected = own(moe).sort("doc_id", "pos", "layer")
    for column in ("doc_id", "pos", "layer"):
        assert found[column].to_list() == expected[column].to_list()
    assert [list(ids) for ids in found["expert_ids"]] == [list(ids) for ids in expected["expert_ids"]]
    for column in ("routing_weights", "router_margin"):
        first, second = (torch.tensor(frame[column].to_list()) for frame in (found, expected))
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_foreign_routers_choose_as_if_they_were_built_in_at_the_first_layer(moe: Qwen3Moe, other: Qwen3Moe) -> None:
    """At the first routed layer the hidden states are untouched by routing, so swapping the weight is the same."""
    found = exchanged_routing(moe, other, NAMES, SEQUENCES).frame
    with torch.no_grad():
        moe.blocks[0].mlp.router.weight.copy_(other.blocks[0].mlp.router.weight)
    expected = own(moe)
    first, second = (
        frame.filter(pl.col("layer") == 0).sort("doc_id", "pos")["expert_ids"].to_list() for frame in (found, expected)
    )
    assert [list(ids) for ids in first] == [list(ids) for ids in second]


def test_the_run_is_undisturbed(moe: Qwen3Moe, other: Qwen3Moe) -> None:
    tokens = torch.tensor([SEQUENCES[0]])
    before = moe(tokens)
    exchanged_routing(moe, other, NAMES, SEQUENCES)
    assert torch.equal(moe(tokens), before)


def test_settings_say_what_ran(moe: Qwen3Moe, other: Qwen3Moe, tmp_path: Path) -> None:
    result = exchanged_routing(moe, other, NAMES, SEQUENCES)
    read = Result.read(result.write(tmp_path / "exchanged.parquet"))
    assert read.frame.equals(result.frame)
    weights = [read.settings[name]["model"]["weights"] for name in ("states", "routers")]
    assert weights == [weights_hash(moe), weights_hash(other)]
    assert read.settings["docs"] == NAMES
    again = exchanged_routing(moe, other, NAMES, [[7, 8, 9, 11], SEQUENCES[1]]).settings
    assert {key for key, value in again.items() if value != read.settings[key]} == {"sequences"}


def test_models_of_other_shapes_are_refused(moe: Qwen3Moe, llama) -> None:
    with pytest.raises(ConfigError, match="expected a mixture of experts"):
        exchanged_routing(llama, moe, NAMES, SEQUENCES)
    small = build_model(replace(moe.cfg, sparse_layers=(True, True, True)))
    with pytest.raises(ConfigError, match="expected the same layers and width"):
        exchanged_routing(moe, small, NAMES, SEQUENCES)
