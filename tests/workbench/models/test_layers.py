"""The linear map that takes a few rows as columns: the same values, and bits that depend on nobody else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.models import Llama, layers
from workbench.models.blocks import check_block
from workbench.models.layers import Linear


@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("n_in", "n_out"), [(1024, 512), (520, 999)])
def test_values_are_those_of_the_plain_product(n_rows: int, n_in: int, n_out: int) -> None:
    torch.manual_seed(0)
    linear = Linear(n_in, n_out)
    x = torch.randn(n_in, 2, n_rows).transpose(0, 2)[:, :1]  # [batch pos n_in], in no usual layout
    found = linear(x)
    torch.testing.assert_close(found, F.linear(x.double(), linear.weight.double()).float())
    assert found.is_contiguous()
    found.square().sum().backward()
    double = linear.weight.detach().double().requires_grad_()
    F.linear(x.double(), double).square().sum().backward()
    torch.testing.assert_close(linear.weight.grad, double.grad.float(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("n_rows", [2, 3, 4])
def test_the_bits_of_a_row_depend_on_no_neighbour_and_no_place(n_rows: int) -> None:
    torch.manual_seed(0)
    linear, mine = Linear(1024, 512), torch.randn(1024)
    found = []
    for place in range(n_rows):
        x = torch.randn(n_rows, 1, 1024)
        x[place, 0] = mine
        found.append(linear(x)[place, 0])
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_model_of_such_maps_generates_the_same_bits_whoever_listens(
    model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "BEYOND_CACHE", 1)
    tokens = torch.randint(0, 50, (3, 5), generator=torch.Generator().manual_seed(0))
    plain = model.generate(tokens, max_new_tokens=8, stop_ids=())
    names = [
        name for name, point in model.hook_dict.items()
        if name.startswith("blocks.") and point.shape.startswith("batch pos") and not point.cost
    ]  # fmt: skip
    recorded = model.generate(tokens, max_new_tokens=8, stop_ids=(), record=names)
    assert torch.equal(recorded.tokens, plain.tokens)
    one = plain.tokens[:, :1]
    seen: list[Tensor] = []
    with torch.no_grad(), model.hooks([(names, lambda x, hook: seen.append(x))]):
        listened = model(one)
    assert seen
    assert torch.equal(listened, model(one))
    check_block(model, 4)
