"""The tables of docs/hardware.md are those that `workbench memory` computes today."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.cli import main
from workbench.errors import ConfigError
from workbench.family import FAMILY
from workbench.memory import predict
from workbench.models.room import GIB

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "hardware.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "hardware_tables.py"))


def test_the_page_holds_what_is_computed_now(script: dict[str, Any]) -> None:
    assert script["written"](PAGE) == PAGE, "run python docs/hardware_tables.py"


def test_a_number_that_drifted_is_noticed(script: dict[str, Any]) -> None:
    weights = script["needs"]().splitlines()[2].split(" | ")[2]
    assert f" | {weights} | " in PAGE
    assert script["written"](PAGE.replace(f" | {weights} | ", " | 99.9 | ", 1)) == PAGE


def test_the_sizes_stand_for_the_whole_family(script: dict[str, Any]) -> None:
    shown = {FAMILY[name].config for name in script["MODELS"].values()}
    assert {member.config for member in FAMILY.values()} == shown


def test_the_longest_context_fits_and_one_more_does_not(script: dict[str, Any]) -> None:
    checked = 0
    for row in script["fits"]().splitlines()[2:]:
        name, form, *cells = row.strip("| ").split(" | ")
        cfg = FAMILY[script["MODELS"][name]].config
        experts = form if form in ("int8", "int4") else "plain"
        for card, cell in zip(script["CARDS"], cells, strict=True):
            room = 0.9 * card * GIB
            if cell == "no":
                assert predict(cfg, 1, experts=experts).resident > room
            elif not cell.endswith("(all)"):
                n = int(cell.replace(",", ""))
                assert predict(cfg, n, experts=experts).resident <= room
                assert predict(cfg, n + 1, experts=experts).resident > room
                checked += 1
    assert checked >= 3


def test_what_the_prose_says_of_each_machine_is_in_the_table(script: dict[str, Any]) -> None:
    rows = [row.strip("| ").split(" | ") for row in script["fits"]().splitlines()[2:]]
    cells = {(row[0], row[1]): dict(zip(script["CARDS"], row[2:], strict=True)) for row in rows}
    dense = "none; all bf16"
    assert cells["8B", dense][24] != "no"
    assert cells["8B", dense][32] != "no"
    assert cells["32B-A3B", "int4"][24] != "no"
    assert cells["32B-A3B", "int8"][24] == "no"
    assert cells["32B-A3B", "int8"][48] != "no"
    assert cells["32B-A3B", "bf16"][48] == "no"
    assert "no" not in (cells["33B", dense][80], cells["32B-A3B", "bf16"][80])
    assert "(all)" not in cells["33B", dense][80]
    assert all("(all)" in cell[141] for cell in cells.values())


@pytest.mark.parametrize("experts", ["int8", "int4"])
def test_quantised_experts_are_what_a_model_with_them_holds(experts: str) -> None:
    from workbench.models import build_model

    cfg = FAMILY["llm-jp-4-32b-a3b-base"].config
    model = build_model(cfg, torch.bfloat16, "meta", moe_impl="reference", experts=experts)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    predicted = predict(cfg, 4096, experts=experts).weights
    assert abs(held - predicted) < 1e-4 * predicted  # the rotary tables are buffers of the model, and no weights
    with pytest.raises(ConfigError, match="expected plain for a model without experts"):
        predict(FAMILY["llm-jp-4-8b-base"].config, 4096, experts=experts)


def test_the_commands_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL).group(1).splitlines()
    for command in commands:
        assert main(command.split()[1:]) == 0
        assert "in memory at once" in capsys.readouterr().out
