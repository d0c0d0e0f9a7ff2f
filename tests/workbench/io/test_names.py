"""The table of tensor names."""

from __future__ import annotations

import pytest

from workbench.errors import CheckpointError
from workbench.family import FAMILY
from workbench.io.names import ignorable, layout_of, slots


@pytest.mark.parametrize(
    ("name", "n_tensors"), [("llm-jp-4-8b-base", 291), ("llm-jp-4-33b-base", 579), ("llm-jp-4-32b-a3b-base", 12_579)]
)
def test_released_checkpoints_have_that_many_tensors(name: str, n_tensors: int) -> None:
    assert len(slots(FAMILY[name].config, "per_expert")) == n_tensors


def test_the_layout_shows_in_the_names() -> None:
    sparse, dense = FAMILY["llm-jp-4-32b-a3b-base"].config, FAMILY["llm-jp-4-8b-base"].config
    assert layout_of(slots(sparse, "fused")) == "fused"
    assert layout_of(slots(sparse, "per_expert")) == "per_expert"
    assert slots(dense, "fused") == slots(dense, "per_expert")


def test_rotary_frequencies_of_the_layers_that_exist_are_ignorable() -> None:
    cfg = FAMILY["llm-jp-4-8b-base"].config
    assert len(ignorable(cfg)) == cfg.n_layers
    assert f"model.layers.{cfg.n_layers - 1}.self_attn.rotary_emb.inv_freq" in ignorable(cfg)
    assert ignorable(cfg).isdisjoint(slots(cfg, "per_expert"))


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(CheckpointError, match="layout: expected one of per_expert, fused, got 'stacked'"):
        slots(FAMILY["llm-jp-4-8b-base"].config, "stacked")  # type: ignore[arg-type]
