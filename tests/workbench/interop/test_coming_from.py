"""docs/coming-from.md: five tasks, four ways, the same numbers."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = (REPOSITORY / "docs" / "coming-from.md").read_text(encoding="utf-8")
WAYS = {"workbench": None, "TransformerLens": "transformer_lens", "nnsight": "nnsight", "transformers": "transformers"}
TASKS = re.split(r"^## ", PAGE, flags=re.MULTILINE)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the other libraries
]


def blocks(text: str, way: str) -> list[str]:
    found = re.findall(r"^```python\n# (\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for name, code in found if name in ("all", way)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the blocks of each way leave behind, run in the order of the page; every assert in them holds."""
    folder, found = tmp_path_factory.mktemp("pages"), {}
    for way, package in WAYS.items():
        if package:
            pytest.importorskip(package, reason="that extra is not installed")
        script = folder / f"{way.lower()}_way.py"  # a file: nnsight reads the source of a with block
        script.write_text("\n".join(blocks(PAGE, way)), encoding="utf-8")
        try:
            found[way] = runpy.run_path(str(script))
        finally:
            torch.set_grad_enabled(True)
    return found


ROUNDING = 5e-5  # of the largest number that was computed with: eager and fused attention sum in another order


def largest(results: dict[str, dict[str, Any]], name: str) -> float:
    """What the rounding of `name` is relative to: a difference of logits rounds as the logits do."""
    scale = "before" if name in ("effect", "dropped") else name
    return max(float(tensor.abs().max()) for tensor in _tensors(results["workbench"][scale]))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [tensor.float() for tensor in (value if isinstance(value, list) else [value])]


def test_every_task_is_done_each_way() -> None:
    assert len(TASKS) == 6, "an opening and five tasks"
    for task in TASKS[1:]:
        assert [len(blocks(task, way)) for way in WAYS] == [1, 1, 1, 1], task.splitlines()[0]


def test_the_versions_on_the_page_are_the_pinned_ones() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    for package in ("transformer-lens", "nnsight", "transformers"):
        assert f"{package.replace('-', '_')} {pins[package]}" in PAGE


@pytest.mark.parametrize("name", ["resid", "patched", "router_logits", "effect", "dropped"])
def test_all_ways_give_the_same_numbers(results: dict[str, dict[str, Any]], name: str) -> None:
    ours, noise = _tensors(results["workbench"][name]), ROUNDING * largest(results, name)
    assert all(tensor.abs().max() > 20 * noise for tensor in ours), "large enough to be told apart"
    for way, found in results.items():
        for one, other in zip(ours, _tensors(found[name]), strict=True):
            assert one.shape == other.shape, way
            assert (one - other).abs().max() <= noise, way


def test_all_ways_write_the_same_tokens(results: dict[str, dict[str, Any]]) -> None:
    ours = results["workbench"]["written"]
    assert ours.shape[1] == results["workbench"]["clean"].shape[1] + 6
    for way, found in results.items():
        assert torch.equal(found["written"], ours), way


def test_all_ways_find_the_same_experts(results: dict[str, dict[str, Any]]) -> None:
    """As sets, where the first expert left out is not within rounding of the last one chosen."""
    ours = results["workbench"]
    for way, found in results.items():
        assert found["expert"] == ours["expert"], way
        for logits, ids, others in zip(ours["router_logits"], ours["expert_ids"], found["expert_ids"], strict=True):
            top = logits.topk(ids.shape[1] + 1).values
            clear = top[:, -2] - top[:, -1] > 1e-3
            assert clear.float().mean() > 0.9
            assert torch.equal(ids.sort().values[clear], others.sort().values[clear].to(ids.dtype)), way


def test_the_two_meanings_of_a_knock_out_differ(results: dict[str, dict[str, Any]]) -> None:
    ours = results["workbench"]
    assert (ours["effect"] - ours["dropped"]).abs().max() > 20 * ROUNDING * largest(results, "effect")


def test_an_edit_in_one_invoke_of_stock_nnsight_moves_the_other_prompt(results: dict[str, dict[str, Any]]) -> None:
    leaked = results["nnsight"]["leaked"]
    assert leaked.abs().max() > 0.5 * results["workbench"]["effect"].abs().max()
