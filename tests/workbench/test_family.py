from __future__ import annotations

import pytest

from workbench.errors import ConfigError
from workbench.family import FAMILY, family_member, params_table
from workbench.models import Llama, Qwen3Moe, build_model

PUBLISHED = {
    "llm-jp-4-8b-base": (8_590_200_832, 8_590_200_832),
    "llm-jp-4-33b-base": (33_219_548_160, 33_219_548_160),
    "llm-jp-4-32b-a3b-base": (32_139_028_992, 3_827_476_992),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    config = family_member(name).config
    assert (config.n_params, config.n_activated_params) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_parameters_of_the_built_model(name: str) -> None:
    config = family_member(name).config
    model = build_model(config, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == config.n_params


def test_counts_of_mixed_models(moe: Qwen3Moe, llama: Llama) -> None:
    for model in (moe, llama):
        assert sum(parameter.numel() for parameter in model.parameters()) == model.cfg.n_params


def test_the_card_of_32b_a3b() -> None:
    table = params_table("llm-jp-4-32b-a3b-base", family_member("llm-jp-4-32b-a3b-base").config)
    counts = [line.split()[-1] for line in table.splitlines()[1:]]
    assert counts == ["32,139,028,992", "3,827,476,992", "503,316,480", "31,635,712,512"]


def test_every_released_name_is_known() -> None:
    assert len(FAMILY) == 10
    assert family_member("llm-jp/llm-jp-4.1-32b-a3b-thinking").hub_id == "llm-jp/llm-jp-4.1-32b-a3b-thinking"


def test_an_unknown_name_lists_close_ones() -> None:
    with pytest.raises(ConfigError, match=r"got 'llm-jp-4-8b-thinkin'\. Did you mean llm-jp-4-8b-thinking"):
        family_member("llm-jp-4-8b-thinkin")
