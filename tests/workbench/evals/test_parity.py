"""On every bundled checkpoint the adapter gives what the harness's own transformers backend gives."""

from __future__ import annotations

from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from workbench.evals.adapter import WorkbenchLM
from workbench.evals.harness import load_tasks
from workbench.io.hub import BUNDLED, resolve

PLAIN = {
    "loglikelihood": [
        ("The capital of France is", " Paris."),
        ("The capital of France is ", "Rome."),
        ("フランスの首都は", "パリです。"),
        ("<|startoftext|>27 + 15 =", " 42"),
        ("", "日本の首都は東京です。"),
        ("𠮷野家は", "店です。\n"),
    ],
    "loglikelihood_rolling": [("The capital of France is Paris. " * 120,), ("大きいの反対は小さいです。",)],
    "generate_until": [
        ("The capital of Japan is", {"until": ["\n"], "max_gen_toks": 12}),
        ("<|startoftext|>質問：日本の首都はどこですか。\n答え：", {"until": ["。", "\n\n"], "max_gen_toks": 24}),
        ("Question: What is 2 + 3?\nAnswer:", {"until": ["Question:"], "max_gen_toks": 24, "do_sample": False}),
        ("one two three " * 200, {"until": [], "max_gen_toks": 20}),
        ("<|start|>user<|message|>2 + 3 はいくつですか。<|end|><|start|>assistant", {"until": [], "max_gen_toks": 64}),
    ],
}


def instances(kind: str) -> list[Instance]:
    return [Instance(kind, {}, arguments, n, metadata=("t", n, 1)) for n, arguments in enumerate(PLAIN[kind])]


def assert_same(found: list[Any], wanted: list[Any], what: str) -> None:
    """Texts and greediness equal; numbers within 1e-5 of the largest, or of 1 nat: a sum of logits rounds by those."""
    scale = max([1.0, *(abs(number) for value in wanted for number in _numbers(value))])
    for one, other in zip(found, wanted, strict=True):
        if isinstance(other, str):
            assert one == other, what
            continue
        assert all(abs(a - b) <= 1e-5 * scale for a, b in zip(_numbers(one), _numbers(other), strict=True)), what
        if isinstance(other, tuple | list):
            assert one[1] == other[1], what


def _numbers(value: Any) -> list[float]:
    if isinstance(value, str):
        return []
    return [float(value[0] if isinstance(value, tuple | list) else value)]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLED)
def test_equal_to_the_transformers_backend(name: str) -> None:
    is_thinking = name.endswith("thinking")
    theirs = HFLM(
        str(resolve(name)), device="cpu", dtype="float32", batch_size=8, think_end_token=12 if is_thinking else None
    )
    ours = WorkbenchLM(name, batch_size=8, add_bos=False, progress=False)
    everything = WorkbenchLM(ours.model, batch_size=8, add_bos=False, answers="all", progress=False)
    plain = HFLM(theirs.model, tokenizer=theirs.tokenizer, batch_size=3) if is_thinking else theirs
    for kind in PLAIN:
        found, wanted = (getattr(lm, kind)(instances(kind)) for lm in (everything, plain))
        assert_same(found, wanted, f"{name} {kind}")
    tasks = ["workbench_base"]
    if is_thinking:
        tasks = [
            "workbench_answers_low",
            "workbench_answers_medium",
            "workbench_reference_medium",
            "workbench_texts_ja",
        ]
    loaded = load_tasks(tasks)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1)
    results = [lm_eval.evaluate(lm, loaded, limit=5, bootstrap_iters=0, log_samples=True) for lm in (ours, theirs)]
    for task, samples in results[1]["samples"].items():
        for mine, other in zip(results[0]["samples"][task], samples, strict=True):
            assert mine["arguments"] == other["arguments"]
            flat = [[reply[0] for reply in sample["resps"]] for sample in (mine, other)]
            assert_same(flat[0], flat[1], f"{name} {task}")
        for metric, value in results[1]["results"][task].items():
            if isinstance(value, float):
                # of means that may be near zero; the numbers that they are made of were compared above
                mine = results[0]["results"][task][metric]
                assert mine == pytest.approx(value, rel=1e-5, abs=1e-4), (name, task, metric)
