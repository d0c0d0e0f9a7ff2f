"""int8 and int4 experts: layout, error, memory, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench_kernels.quant import (
    QuantizedExperts,
    pack_int4,
    quantization_error,
    quantize,
    unpack_int4,
    weight_bytes,
    worst_expert,
)

FORMATS = [(8, 64), (4, 64), (4, 128)]


def weight(n_experts: int = 3, n_rows: int = 20, n_cols: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_experts, n_rows, n_cols, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_every_value_is_within_half_a_step_of_the_weight(bits: int, group: int) -> None:
    exact = weight()
    quantized = quantize(exact, bits, group)
    columns = quantized.group
    step = quantized.scales.float().repeat_interleave(columns, dim=1).transpose(1, 2)  # [E, O, I]
    top = 127 if bits == 8 else 7
    error = (quantized.dequantize() - exact).abs()
    inside = exact.abs() <= step * top  # int4 may clip the largest values for a smaller step
    assert (error <= step * 0.5001)[inside].all()
    assert inside.float().mean() > 0.95


@pytest.mark.parametrize(("bits", "group", "bound"), [(8, 64, 0.008), (4, 64, 0.11), (4, 128, 0.12)])
def test_error_report_names_the_worst_expert(bits: int, group: int, bound: float) -> None:
    exact = weight()
    exact[1] = exact[1] ** 3  # heavy tails: a few large values coarsen the step of all others
    errors = quantization_error(exact, quantize(exact, bits, group))
    assert [row["expert"] for row in errors] == [0, 1, 2]
    assert worst_expert(errors)["expert"] == 1
    assert errors[0]["relative_error"] < bound
    difference = quantize(exact, bits, group).dequantize() - exact
    assert errors[2]["max_error"] == pytest.approx(float(difference[2].abs().max()))
    assert errors[1]["relative_error"] == pytest.approx(float(difference[1].norm() / exact[1].norm()), rel=1e-4)


def test_int4_search_beats_the_largest_magnitude() -> None:
    exact = weight()
    groups = exact.unflatten(-1, (-1, 64))
    step = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / step).round() * step - groups).norm() / groups.norm()
    searched = (quantize(exact, 4, 64).dequantize() - exact).norm() / exact.norm()
    assert searched < plain * 0.98


@given(seed=st.integers(0, 999), group=st.sampled_from([64, 128]), n_groups=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_packing_int4_loses_nothing(seed: int, group: int, n_groups: int) -> None:
    values = torch.randint(-8, 8, (2, 5, n_groups, group), generator=torch.Generator().manual_seed(seed))
    packed = pack_int4(values.to(torch.int8))
    assert packed.dtype == torch.int8
    assert packed.shape == (2, 5, n_groups * group // 2)
    assert torch.equal(unpack_int4(packed, group), values.to(torch.int8).flatten(-2))


def test_int4_layout_is_the_documented_one() -> None:
    columns = torch.arange(128) % 15 - 7
    packed = pack_int4(columns.to(torch.int8).reshape(1, 1, 1, 128))[0, 0].tolist()
    for byte in (0, 1, 63):
        assert (packed[byte] & 0xF) == int(columns[byte]) & 0xF
        assert packed[byte] >> 4 == int(columns[byte + 64])


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("n_cols", [2560, 960])
def test_the_layer_shapes_and_their_bytes(bits: int, group: int, n_cols: int) -> None:
    if n_cols % group and bits == 4:
        with pytest.raises(ValueError, match=r"expected a divisor of the 960 input columns, got 128\. Use group"):
            quantize(weight(2, 4, n_cols), bits, group)
        return
    quantized = quantize(weight(2, 4, n_cols).bfloat16(), bits, group)
    assert quantized.n_bytes == weight_bytes((2, 4, n_cols), bits, group)
    assert quantized.dequantize().dtype == torch.bfloat16
    assert torch.equal(quantized[1], quantized.dequantize()[1])
    assert quantized.scales.shape == (2, 1 if bits == 8 else n_cols // group, 4)


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros_and_nan_is_refused(bits: int) -> None:
    empty = torch.zeros(1, 3, 64)
    assert torch.equal(quantize(empty, bits).dequantize(), empty)
    assert quantization_error(empty, quantize(empty, bits))[0]["relative_error"] == 0
    empty[0, 1, 5] = torch.nan
    with pytest.raises(ValueError, match=r"weight\[0\]: expected finite values, got NaN or infinity"):
        quantize(empty, bits)


def test_formats_without_a_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match="bits: expected 8 or 4, got 3"):
        quantize(weight(), 3)
    with pytest.raises(ValueError, match="group: expected 64 or 128, got 32"):
        quantize(weight(), 4, 32)
    with pytest.raises(ValueError, match=r"expected \[expert, out, in\], got shape \[4, 4\]"):
        quantize(torch.zeros(4, 4), 8)
    with pytest.raises(ValueError, match=r"got 64\. Use int8"):
        quantize(torch.zeros(1, 2, 100), 4)


def test_bfloat16_and_non_contiguous_weights_quantise_alike() -> None:
    exact = weight().bfloat16()
    turned = exact.transpose(1, 2).contiguous().transpose(1, 2)
    for bits, group in FORMATS:
        plain, view = quantize(exact, bits, group), quantize(turned, bits, group)
        assert isinstance(view, QuantizedExperts)
        assert torch.equal(plain.values, view.values)
        assert torch.equal(plain.scales, view.scales)
