from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from workbench.axes import ROUTING_COLUMNS, TOKEN_COLUMNS
from workbench.errors import RunError
from workbench.interop.routing_dumps import (
    dump_frames,
    from_vllm,
    read_olmoe,
    read_sglang,
    read_sglang_recorder,
    read_vllm,
)
from workbench.io.tokens import Tokenizer
from workbench.stats.load import slot_counts

NANO_TOKENIZER = Path(__file__).resolve().parents[3] / "data" / "nano" / "tokenizer.json"
LAYERS, EXPERTS, K = 3, 16, 4


def experts(n: int, seed: int = 0) -> np.ndarray:
    """k different experts for each token and layer: [token layer k]."""
    return np.random.default_rng(seed).random((n, LAYERS, EXPERTS)).argsort(-1)[..., :K]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def coded(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(np.int32).tobytes()).decode()


def assert_routed(routing: pl.DataFrame, doc_id: str, wanted: np.ndarray) -> None:
    part = routing.filter(pl.col("doc_id") == doc_id)
    assert part["layer"].to_list() == list(range(LAYERS)) * len(wanted)
    np.testing.assert_array_equal(np.stack(part["expert_ids"].to_list()).reshape(wanted.shape), wanted)


def test_olmoe_lines_come_back_with_k_and_layer_in_place(tmp_path: Path) -> None:
    wanted = experts(5)
    row = {"input_ids": [7, 8, 9, 7, 8], "predicted_token_ids": [0] * 5, "exp_ids": wanted.transpose(0, 2, 1).tolist()}
    tokens, routing = dump_frames(read_olmoe(write(tmp_path / "c4.jsonl", row, row)), EXPERTS)
    assert tokens.columns == list(TOKEN_COLUMNS)
    assert routing.columns == list(ROUTING_COLUMNS)
    assert tokens["doc_id"].unique().sort().to_list() == ["c4-00000", "c4-00001"]
    assert_routed(routing, "c4-00001", wanted)
    assert routing["routing_weights"].null_count() == len(routing)
    assert slot_counts(tokens, routing, ["doc_id"])["slots"].sum() == 2 * wanted.size


@pytest.mark.parametrize("endpoint", ["generate", "logprobs", "chat"])
def test_sglang_responses_come_back_without_the_token_never_run(tmp_path: Path, endpoint: str) -> None:
    wanted, prompt, answer = experts(6), [5, 6, 7, 8], [9, 10, 11]
    if endpoint == "chat":
        row = {"id": "a", "sglext": {"routed_experts": coded(wanted)}, "input_ids": prompt, "output_ids": answer}
    else:
        meta = {"id": "a", "routed_experts": coded(wanted), "prompt_tokens": 4, "completion_tokens": 3}
        row = {"text": "x", "output_ids": answer, "meta_info": meta, "input_ids": prompt}
        if endpoint == "logprobs":
            meta["input_token_logprobs"] = [[None, token, None] for token in prompt]
            meta["output_token_logprobs"] = [[-0.5, token, None] for token in answer]
            row = {"text": "x", "meta_info": meta}
    tokens, routing = dump_frames(read_sglang(write(tmp_path / "s.jsonl", row), LAYERS, K), EXPERTS)
    assert tokens["token_id"].to_list() == [*prompt, 9, 10]
    assert tokens["phase"].to_list() == ["prefill"] * 4 + ["decode"] * 2
    assert_routed(routing, "a", wanted)


def test_a_response_that_starts_later_keeps_its_positions(tmp_path: Path) -> None:
    wanted = experts(3)
    meta = {"id": "a", "routed_experts": coded(wanted), "routed_experts_start_len": 2}
    row = {"input_ids": [1, 2, 3, 4], "output_ids": [5, 6], "meta_info": meta}
    tokens, routing = dump_frames(read_sglang(write(tmp_path / "s.jsonl", row), LAYERS, K), EXPERTS)
    assert tokens["pos"].to_list() == [2, 3, 4]
    assert routing["pos"].unique().sort().to_list() == [2, 3, 4]


@pytest.mark.parametrize("packed", [True, False])
def test_vllm_outputs_come_back_from_files_and_from_memory(tmp_path: Path, packed: bool) -> None:
    wanted = experts(5)
    stored = {"data": coded(wanted), "shape": list(wanted.shape), "dtype": "int32"} if packed else wanted.tolist()
    row = {"request_id": "r1", "prompt_token_ids": [1, 2, 3], "token_ids": [4, 5, 6], "routed_experts": stored}
    dumps = read_vllm(write(tmp_path / "v.jsonl", row))
    completion = SimpleNamespace(token_ids=(4, 5, 6), routed_experts=wanted.astype(np.uint8))
    again = from_vllm([SimpleNamespace(request_id="r1", prompt_token_ids=[1, 2, 3], outputs=[completion])])
    for found in (dumps, again):
        tokens, routing = dump_frames(found, EXPERTS)
        assert tokens["token_id"].to_list() == [1, 2, 3, 4, 5]
        assert_routed(routing, "r1", wanted)


def recorder(path: Path, **changes: object) -> Path:
    prefill = {"forward_pass_id": 1, "rank": 0, "gatherer_key": "primary", "input_ids": [1, 2, 3, 4, 5],
               "positions": [0, 1, 2, 0, 1], "extend_seq_lens": [3, 2], "forward_mode": 1,
               "topk_ids_of_layer": _padded(experts(5))}  # fmt: skip
    decode = {**prefill, "input_ids": [6, 7], "positions": [3, 2], "extend_seq_lens": None, "forward_mode": 2,
              "topk_ids_of_layer": _padded(experts(2, seed=1))}  # fmt: skip
    torch.save({"records": [{**prefill, **changes}, decode], "last_physical_to_logical_map": None}, path)
    return path


def _padded(values: np.ndarray) -> torch.Tensor:
    """[layer token 8] with -1 behind k, as SGLang fills its buffer."""
    full = torch.full((LAYERS, len(values), 8), -1, dtype=torch.int32)
    full[..., :K] = torch.from_numpy(values.transpose(1, 0, 2).copy())
    return full


def test_recorder_passes_are_cut_into_whole_prompts(tmp_path: Path) -> None:
    dumps, left_out = read_sglang_recorder(recorder(tmp_path / "rec.pt"), k=K)
    assert [dump.ids for dump in dumps] == [(1, 2, 3), (4, 5)]
    assert left_out == 2  # the decode step names no request
    _, routing = dump_frames(dumps, EXPERTS)
    assert_routed(routing, "rec-00001", experts(5)[3:])
    cached, left_out = read_sglang_recorder(recorder(tmp_path / "b.pt", positions=[4, 5, 6, 0, 1]), k=K)
    assert [dump.ids for dump in cached] == [(4, 5)]
    assert left_out == 5
    _, left_out = read_sglang_recorder(recorder(tmp_path / "c.pt", extend_seq_lens=[3]), k=K)
    assert left_out == 4  # two tokens belong to no sequence that the pass names


def test_a_recorder_dump_with_the_wrong_k_or_nothing_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected 8 different experts for token 0 in layer 0, got .*-1"):
        read_sglang_recorder(recorder(tmp_path / "a.pt"), k=8)
    with pytest.raises(RunError, match="expected 3 experts per token and layer, got 4 of 8 places filled"):
        read_sglang_recorder(recorder(tmp_path / "a.pt"), k=3)  # else the fourth would be dropped without a word
    with pytest.raises(RunError, match="expected 10 experts per token and layer, got 4 of 8 places filled"):
        read_sglang_recorder(recorder(tmp_path / "a.pt"), k=10)
    (tmp_path / "b.pt").write_bytes(b"nothing")
    with pytest.raises(RunError, match="expected a recorder dump with records"):
        read_sglang_recorder(tmp_path / "b.pt")
    torch.save({"records": [{"input_ids": [1]}]}, tmp_path / "c.pt")
    with pytest.raises(RunError, match="expected a record of mode per_token, got none for 'positions'"):
        read_sglang_recorder(tmp_path / "c.pt")


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"records": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(RunError, match="expected a recorder dump"):
        read_sglang_recorder(tmp_path / "bad.pt")
    assert not (tmp_path / "touched").exists()


VLLM = {"prompt_token_ids": [1, 2], "token_ids": [3], "routed_experts": experts(2).tolist()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routed_experts": experts(7).tolist()}, r"v\.jsonl:2: expected experts \[token layer k\] of 3 tokens"),
        ({"routed_experts": np.zeros((2, LAYERS, K), int).tolist()}, "expected 4 different experts for token 0"),
        ({"routed_experts": None}, "expected routed_experts as whole numbers in three dimensions"),
        ({"routed_experts": [[[1, 2], [3]]]}, "expected routed_experts as whole numbers"),
        (
            {"routed_experts": {"data": "!", "shape": [1], "dtype": "int32"}},
            "expected routed_experts as base64 of int32",
        ),
        ({"routed_experts": {"data": coded(experts(2)), "shape": [9, 9, 9]}}, r"of shape \[9, 9, 9\], got 24 numbers"),
        ({"token_ids": None}, "expected token_ids as a list of token ids"),
        ({"prompt_token_ids": ["a"]}, "expected prompt_token_ids"),
    ],
)
def test_what_does_not_fit_is_named_with_its_line(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(RunError, match=message):
        read_vllm(write(tmp_path / "v.jsonl", VLLM, {**VLLM, **change}))


def test_files_that_are_no_dumps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected a JSONL file"):
        read_vllm(tmp_path / "nothing.jsonl")
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(RunError, match=r"a\.jsonl:1: expected JSON"):
        read_olmoe(tmp_path / "a.jsonl")
    with pytest.raises(RunError, match="expected an object, got list"):
        read_olmoe(write(tmp_path / "b.jsonl", [1]))
    row = {"input_ids": [1, 2, 3], "meta_info": {"routed_experts": coded(experts(2))}}
    with pytest.raises(RunError, match="expected routed_experts of 5 layers x 4 experts, got 24 numbers"):
        read_sglang(write(tmp_path / "c.jsonl", row), 5, K)
    with pytest.raises(RunError, match="Ask the server to return them"):
        read_sglang(write(tmp_path / "d.jsonl", {"input_ids": [1], "meta_info": {}}), LAYERS, K)


def test_labels_join_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    rows = [{**VLLM, "request_id": name} for name in ("q1-ja", "q1-en")]
    dumps = read_vllm(write(tmp_path / "v.jsonl", *rows))
    labels = pl.DataFrame({"doc_id": ["q1-ja", "q1-en"], "group_id": ["q1", "q1"], "lang": ["ja", "en"]})
    tokens, _ = dump_frames(dumps, EXPERTS, labels=labels)
    assert tokens.group_by("group_id", "lang", "split").len().height == 2
    alone, _ = dump_frames(dumps, EXPERTS)
    assert alone["group_id"].to_list() == alone["doc_id"].to_list()
    for wrong, message in (
        (labels.head(1), "got none for q1-en"),
        (labels.rename({"lang": "language"}), "labels: expected doc_id once each"),
        (pl.concat([labels, labels]), "labels: expected doc_id once each"),
    ):
        with pytest.raises(RunError, match=message):
            dump_frames(dumps, EXPERTS, labels=wrong)
    with pytest.raises(RunError, match="expected experts 0 to 3"):
        dump_frames(dumps, 4)
    with pytest.raises(RunError, match="got the same twice"):
        dump_frames([dumps[0], dumps[0]], EXPERTS)


def test_a_tokenizer_gives_text_classes_and_segments(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(NANO_TOKENIZER)
    ids = tokenizer.to_tokens("<|start|>user<|message|>海はなぜ青い?<|end|>", bos=False)
    row = {"prompt_token_ids": ids, "token_ids": [2], "routed_experts": experts(len(ids)).tolist()}
    tokens, _ = dump_frames(read_vllm(write(tmp_path / "v.jsonl", row)), EXPERTS, tokenizer=tokenizer)
    assert set(tokens["segment"]) == {"control", "user"}
    assert {"kanji", "hiragana", "special"} <= set(tokens["token_class"])
    assert tokens.filter(pl.col("segment") == "user")["pos_in_segment"].to_list()[0] == 0
