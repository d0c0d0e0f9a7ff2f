"""What `fused_moe` accepts and refuses, and the oracle against a loop over slots written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moe_problems import problem, relative

from workbench_kernels import Intervene, Need, choose_implementation, fused_moe, quantize
from workbench_kernels.moe.choice import CHOICES
from workbench_kernels.moe.plan import NEEDS
from workbench_kernels.moe.reference import reference_moe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EVERY = ("auto", *CHOICES)  # triton too: arguments are looked at before it is asked whether an implementation can run
NO_INTEGERS: tuple[Any, ...] = (2.0, True, "2", None, torch.tensor(2), [2])


def test_the_oracle_equals_a_loop_over_slots() -> None:
    p = problem(5, 12, 6, 7, 3)
    x, router, gate_up, down = (tensor.double() for tensor in p.args[:4])
    y, routing = reference_moe(*p.args, need=NEEDS)
    for t in range(5):
        probs = (router @ x[t]).softmax(0)
        ids = probs.argsort(descending=True)[:3]
        assert routing.expert_ids[t].tolist() == ids.tolist()
        total = torch.zeros(12, dtype=torch.float64)
        for slot, expert in enumerate(ids.tolist()):
            gate, up = gate_up[expert, :6] @ x[t], gate_up[expert, 6:] @ x[t]
            out = down[expert] @ (F.silu(gate) * up)
            assert torch.allclose(routing.expert_pre[t, slot], gate)
            assert torch.allclose(routing.expert_pre_linear[t, slot], up)
            assert torch.allclose(routing.expert_post[t, slot], F.silu(gate) * up)
            assert torch.allclose(routing.expert_out[t, slot], out)
            total += probs[expert] / probs[ids].sum() * out
        assert torch.allclose(y[t], total)
        logits = (router @ x[t]).sort(descending=True).values
        assert torch.allclose(routing.margin[t], logits[2] - logits[3])


def test_the_order_of_interventions_is_the_documented_one() -> None:
    """scale, then add, then replace; bias, then mask; forced ids and weights last: one value tells them apart."""
    p = problem(2, 3, 2, 4, 2)
    change = Intervene(
        router_bias=torch.full((4,), 100.0).index_fill(0, torch.tensor([1]), 200.0),
        keep_mask=torch.tensor([True, False, True, True]),
        expert_scale=torch.tensor([0.0, 1, 0, 0]),
        expert_add=torch.ones(4, 3),
        replace_experts=torch.tensor([False, False, False, True]),
        replace_rows=torch.full((2, 2, 3), 7.0),
        forced_ids=torch.tensor([[0, 3], [1, 2]]),
        forced_weights=torch.tensor([[1.0, 10.0], [1.0, 1.0]]),
    )
    y, routing = reference_moe(*p.args, intervene=change, need=("expert_out", "router_probs"))
    assert torch.allclose(y[0], torch.full((3,), 71.0, dtype=torch.float64))
    assert torch.allclose(routing.expert_out[1, 1], torch.ones(3, dtype=torch.float64))
    assert (routing.router_probs[:, 1] == 0).all()
    assert relative(routing.router_logits, p.x.double() @ p.router.double().T) < 1e-12


@pytest.mark.parametrize("as_given", [list, tuple, torch.tensor])
def test_bools_are_a_mask_and_numbers_are_ids_however_they_are_given(as_given: Any) -> None:
    p = problem(3, 12, 6, 5, 2)
    for tokens, shown in (([False, False, True], [2]), ([2], [2]), ([1, 0], [0, 1]), ([], [])):
        given = as_given(tokens) if tokens else []
        out = fused_moe(*p.args, need=Need(("expert_out",), tokens=given))[1].expert_out
        assert out.any(-1).any(-1).nonzero().flatten().tolist() == shown


def test_a_layer_of_which_nothing_fits_is_refused() -> None:
    p = problem(3, 12, 6, 5, 2)
    x, router, gate_up, down, k = p.args
    for args, message in [
        ((x[0], router, gate_up, down, k), r"x: expected a floating tensor \[T, d_model\], got torch.float32 \[12\]"),
        ((x.long(), router, gate_up, down, k), r"x: expected a floating tensor"),
        ((x.tolist(), router, gate_up, down, k), r"x: expected a floating tensor .* got list\. Flatten or convert it"),
        *(
            (
                (x, router.to(dtype), gate_up, down, k),
                rf"router_weight: expected a floating tensor .* got {dtype} \[5, 12",
            )
            for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2)
        ),
        ((x, router.numpy(), gate_up, down, k), r"router_weight: expected a floating tensor \[E, 12\], got ndarray"),
        ((x, router, list(gate_up), down, k), r"gate_up: expected a tensor or QuantizedExperts, got list\. Stack"),
        ((x, router, gate_up, down.numpy(), k), r"down: expected a tensor or QuantizedExperts, got ndarray"),
        ((x, router[:, 1:], gate_up, down, k), r"router_weight: expected \[E, 12\], got \[5, 11\]"),
        ((x, router, gate_up[:4], down, k), r"gate_up: expected \[5, 2·d_expert, 12\], got \[4, 12, 12\]"),
        ((x, router, gate_up[:, 1:], down, k), r"gate_up: expected an even number of rows .* got 11"),
        ((x, router, gate_up, down.transpose(1, 2), k), r"down: expected \[5, 12, 6\], got \[5, 6, 12\]"),
        ((x, router, gate_up.bfloat16(), down, k), r"gate_up: expected torch.float32 like x, got torch.bfloat16"),
        ((x, router, gate_up, down.to("meta"), k), r"down: expected device cpu like x, got meta"),
        ((x, router, gate_up, down, 0), r"k: expected 1 to 5 \(the number of experts\), as an int, got 0"),
        ((x, router, gate_up, down, 6), r"k: expected 1 to 5"),
        *(((x, router, gate_up, down, wrong), r"k: expected 1 to 5 .* as an int, got") for wrong in NO_INTEGERS),
    ]:
        for impl in EVERY:
            with pytest.raises(ValueError, match=message):
                fused_moe(*args, impl=impl)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"need": "expert_out"}, r"need: expected a tuple of names, got 'expert_out'"),
        ({"need": ("outputs",)}, r"need: expected names among expert_pre, .*, got 'outputs'"),
        ({"need": Need(("expert_out",), experts=[5])}, r"need.experts: expected ids from 0 to 4, got 5 to 5"),
        ({"need": Need(("expert_out",), tokens=torch.ones(4).bool())}, r"need.tokens: expected ids or a mask \[3\]"),
        ({"need": Need(("expert_out",), tokens=[True] * 4)}, r"need.tokens: expected ids or a mask \[3\]"),
        (
            {"need": Need(("expert_out",), experts=[1.5])},
            r"need.experts: expected ids in one dimension, got torch.float32",
        ),
        ({"need": Need(("expert_out",), tokens=torch.ones(3))}, r"need.tokens: expected ids in one dimension"),
        ({"need": 5}, r"need: expected a tuple of names or a Need, got int\. Write"),
        ({"need": True}, r"need: expected a tuple of names or a Need, got bool"),
        ({"need": {"margin": True}}, r"need: expected a tuple of names or a Need, got dict"),
        ({"need": ["margin", 3]}, r"need: expected names among expert_pre, .*, got 3\. Ask"),
        ({"need": Need("margin")}, r"need: expected a tuple of names, got 'margin'"),
        ({"need": Need(3)}, r"need: expected a tuple of names or a Need, got int"),
        ({"need": Need((), experts=5)}, r"need.experts: expected ids or a mask, got 5\. Give a list of integers"),
        ({"need": Need((), tokens="0")}, r"need.tokens: expected ids or a mask, got '0'"),
        ({"need": Need((), experts=[1, None])}, r"need.experts: expected ids or a mask, got \[1, None\]"),
        (
            {"need": Need((), experts=torch.ones(2, dtype=torch.complex64))},
            r"need.experts: .*got torch.complex64 \[2\]",
        ),
        ({"need": Need((), tokens=[9])}, r"need.tokens: expected ids from 0 to 2, got 9 to 9\. Leave"),
        ({"intervene": {}}, r"intervene: expected an Intervene or None, got dict\. Write intervene=Intervene"),
        ({"intervene": {"expert_scale": torch.ones(5)}}, r"intervene: expected an Intervene or None, got dict"),
        ({"intervene": False}, r"intervene: expected an Intervene or None, got bool"),
        ({"path": "fast"}, r"path: expected one of auto, decode, skinny, tile, got 'fast'"),
        ({"path": None}, r"path: expected one of auto, decode, skinny, tile, got None"),
        ({"numerics": ["hf"]}, r"numerics: expected one of trained, hf, got \['hf'\]\. Name one"),
        ({"path": "tile", "impl": "sorted"}, r"path: expected auto with impl 'sorted', got 'tile'"),
        ({"numerics": "exact"}, r"numerics: expected one of trained, hf, got 'exact'"),
        ({"impl": None}, r"moe_impl: expected one of auto, .* got None\. Name one of them"),
        ({"impl": "cuda"}, r"moe_impl: expected one of auto, sorted, grouped_mm, reference, triton, got 'cuda'"),
    ],
)
def test_what_is_asked_for_must_exist(options: dict[str, Any], message: str) -> None:
    for impl in (options["impl"],) if "impl" in options else EVERY:
        with pytest.raises(ValueError, match=message):
            fused_moe(*problem(3, 12, 6, 5, 2).args, **options | {"impl": impl})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_bias": torch.zeros(4)}, r"router_bias: expected a floating tensor \[5\] or \[3, 5\], got .* \[4\]"),
        ({"keep_mask": torch.ones(5)}, r"keep_mask: expected a bool tensor"),
        ({"keep_mask": torch.arange(5) < 1}, r"keep_mask: expected at least k = 2 experts to remain, got 1"),
        ({"expert_scale": [1.0] * 5}, r"expert_scale: expected a floating tensor \[5\], got list"),
        ({"expert_add": torch.zeros(5, 11)}, r"expert_add: expected a floating tensor \[5, 12\]"),
        ({"forced_ids": torch.zeros(3, 2)}, r"forced_ids: expected an integer tensor \[3, 2\]"),
        *(
            (
                {name: torch.zeros(shape, dtype=torch.complex64)},
                rf"{name}: expected an? {kind} tensor .* got torch.complex64",
            )
            for name, kind, shape in (
                ("forced_ids", "integer", (3, 2)),
                ("forced_weights", "floating", (3, 2)),
                ("keep_mask", "bool", (5,)),
                ("router_bias", "floating", (5,)),
                ("expert_scale", "floating", (5,)),
            )
        ),
        ({"forced_ids": torch.zeros(3, 2, dtype=torch.uint16)}, r"forced_ids: .* got torch.uint16 \[3, 2\]\. See"),
        ({"forced_ids": torch.zeros(3, 2).bool()}, r"forced_ids: expected an integer tensor \[3, 2\], got torch.bool"),
        (
            {"forced_weights": torch.zeros(3, 2).long()},
            r"forced_weights: expected a floating tensor .* got torch.int64",
        ),
        ({"forced_ids": torch.tensor([[0, 5]] * 3)}, r"forced_ids: expected ids from 0 to 4, got 0 to 5"),
        ({"forced_ids": torch.tensor([[0, -1]] * 3)}, r"forced_ids: expected ids from 0 to 4, got -1 to 0"),
        ({"forced_ids": torch.tensor([[2, 2]] * 3)}, r"forced_ids: expected distinct experts within a token"),
        ({"forced_weights": torch.zeros(3, 3)}, r"forced_weights: expected a floating tensor \[3, 2\]"),
        ({"replace_experts": torch.ones(5).bool()}, r"replace_experts, replace_rows: expected both or neither"),
        ({"router_bias": torch.zeros(5, device="meta")}, r"router_bias: expected device cpu like x, got meta"),
    ],
)
def test_interventions_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    for impl in EVERY:
        with pytest.raises(ValueError, match=message):
            fused_moe(*problem(3, 12, 6, 5, 2).args, intervene=Intervene(**fields), impl=impl)


def test_on_cpu_triton_is_refused_unless_it_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton has no build for this platform")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"got 'triton'\. On CPU they run in triton's interpreter alone"):
        fused_moe(*problem(3, 12, 6, 5, 2).args, impl="triton")
    assert choose_implementation("auto", CPU, torch.bfloat16, gradients=False) == "sorted"
    with pytest.raises(ValueError, match="The kernels take float32, bfloat16 and float16, not float64"):
        choose_implementation("triton", CUDA, torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_implementation("triton", CPU, torch.bfloat16) == "triton"


def test_without_triton_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench_kernels.moe.choice._installed", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed: install the extra `kernels`"):
        choose_implementation("triton", CUDA, torch.bfloat16)


def test_auto_takes_grouped_mm_only_for_weights_that_it_can_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench_kernels.moe.choice._installed", lambda: False)
    even, odd = torch.zeros(2, 128, 64, dtype=torch.bfloat16), torch.zeros(2, 64, 12, dtype=torch.bfloat16)
    for weights, expected in [
        ((), "grouped_mm"),
        ((even, even), "grouped_mm"),
        ((even, odd), "sorted"),
        ((even, quantize(even, 8)), "sorted"),
        ((quantize(even, 4), even), "sorted"),
    ]:
        chosen = choose_implementation("auto", CUDA, torch.bfloat16, gradients=False, weights=weights)
        assert chosen == expected, [type(weight) for weight in weights]
