from __future__ import annotations

import copy
import dataclasses

import pytest

from workbench.config import LlamaConfig, Qwen3MoeConfig, RopeConfig
from workbench.errors import ConfigError
from workbench.hf_config import config_from_hf, config_to_hf

MOE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "vocab_size": 100,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "rope_scaling": None,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True,
    "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False, "eos_token_id": [2, 13],
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "vocab_size": 100, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "mlp_bias": False,
}  # fmt: skip

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def changed(base: dict, **changes: object) -> dict:
    return {**copy.deepcopy(base), **changes}


def without(base: dict, *keys: str) -> dict:
    return {key: value for key, value in base.items() if key not in keys}


def test_reads_a_moe_config() -> None:
    config = config_from_hf(MOE)
    assert isinstance(config, Qwen3MoeConfig)
    assert (config.d_head, config.n_kv_heads, config.k, config.n_experts, config.d_expert) == (32, 2, 2, 8, 16)
    assert config.rope == RopeConfig(theta=500000.0)
    assert config.eos_ids == (2, 13)
    assert config.sparse_layers == (True,) * 4


def test_llama_defaults_follow_transformers() -> None:
    config = config_from_hf(LLAMA)
    assert type(config) is LlamaConfig
    assert (config.n_kv_heads, config.d_head, config.bos_id, config.eos_ids) == (4, 16, 1, (2,))
    assert not config.tie_embeddings


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e6}, RopeConfig(1e6)),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}, RopeConfig(1e6, "linear", 4.0)),
        (
            {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 64},
            RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64),
        ),
    ],
)  # fmt: skip
def test_both_spellings_of_rope_mean_the_same(rope: dict, expected: RopeConfig) -> None:
    new = config_from_hf({**without(LLAMA, "rope_theta"), "rope_parameters": rope})
    scaling = without(rope, "rope_theta") | {"type": rope["rope_type"]}
    old = config_from_hf(changed(LLAMA, rope_theta=rope["rope_theta"], rope_scaling=scaling))
    assert new.rope == old.rope == expected


def test_number_of_experts_under_either_name() -> None:
    resaved = {**without(MOE, "num_experts"), "num_local_experts": 8}
    assert config_from_hf(resaved) == config_from_hf(MOE)
    with pytest.raises(ConfigError, match="num_experts: expected the same value as num_local_experts"):
        config_from_hf(changed(MOE, num_local_experts=4))


@pytest.mark.parametrize(
    ("step", "dense", "expected"),
    [(2, [], (False, True, False, True)), (1, [0], (False, True, True, True)), (2, [3], (False, True, False, False))],
)
def test_mixed_sparse_layers(step: int, dense: list[int], expected: tuple[bool, ...]) -> None:
    config = config_from_hf(changed(MOE, decoder_sparse_step=step, mlp_only_layers=dense))
    assert isinstance(config, Qwen3MoeConfig)
    assert config.sparse_layers == expected
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize("base", [MOE, LLAMA])
def test_written_config_reads_back(base: dict) -> None:
    assert config_from_hf(config_to_hf(config_from_hf(base))) == config_from_hf(base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias: expected False"),
        ({"use_sliding_window": True}, "use_sliding_window: expected False"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types: expected full_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type: expected one of .*got 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope \(linear\): expected keys"),
        (
            {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 4.0}},
            "rope_type: expected the same value as type, got 'linear' and 'dynamic'",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "rope_theta: expected one value"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1"),
        ({"n_shared_experts": 1}, "n_shared_experts: expected only keys this code knows, got 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected only keys"),
        ({"auto_map": {}}, "auto_map: expected only keys"),
        ({"num_experts_per_tok": 9}, "k: expected 1 to 8 experts per token, got 9"),
        ({"num_key_value_heads": 3}, "n_kv_heads: expected a divisor of 4"),
        ({"head_dim": 15}, "d_head: expected an even number"),
        ({"hidden_size": -1}, "hidden_size: expected a positive integer, got -1"),
        ({"vocab_size": "many"}, "vocab_size: expected a positive integer, got 'many'"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: expected a positive integer"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false, got 'false'"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob: expected true or false, got 'false'"),
        ({"norm_topk_prob": None}, "norm_topk_prob: expected true or false, got None"),
        ({"mlp_only_layers": [99]}, "mlp_only_layers: expected layers below 4"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: expected a list of layer numbers, got 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: expected a positive integer, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a positive integer, got 0"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected full_attention in each of 4 layers"),
        ({"layer_types": 3}, "layer_types: expected full_attention"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: expected a number, got '1e-6'"),
        ({"rms_norm_eps": -1.0}, "norm_eps: expected a positive number, got -1.0"),
        ({"rms_norm_eps": None}, "rms_norm_eps: expected a number, got None"),
        ({"rope_theta": "abc"}, "rope_theta: expected a number, got 'abc'"),
        ({"rope_parameters": [1]}, r"rope_parameters: expected an object, got \[1\]"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "8"}}, "rope factor: expected a positive number, got '8'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope factor: expected a positive number, got 0"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope low_freq_factor: expected less than high_freq_factor",
        ),
        ({"rope_scaling": {**LLAMA3, "original_n_ctx": 64}}, r"rope \(llama3\): expected keys .*got .*original_n_ctx"),
        (
            {"rope_scaling": {**without(LLAMA3, "original_max_position_embeddings"), "original_n_ctx": 64}},
            r"rope \(llama3\): expected keys .*'original_max_position_embeddings'\], got .*original_n_ctx",
        ),
        ({"rope_scaling": {"rope_type": 0}}, "rope_type: expected one of .*got 0"),
        ({"rope_scaling": {"type": ""}}, "rope_type: expected one of .*got ''"),
        ({"bos_token_id": 100}, "bos_token_id: expected an id below 100, the vocabulary, got 100"),
        ({"pad_token_id": 100}, "pad_token_id: expected an id below 100, the vocabulary, got 100"),
        ({"head_dim": None, "hidden_size": 66}, "hidden_size: expected a multiple of 4 heads .*got 66. Add head_dim"),
        ({"eos_token_id": [2, 100]}, "eos_token_id: expected ids below 100, the vocabulary"),
        ({"eos_token_id": "2"}, "eos_token_id: expected a token id or a list of them, got '2'"),
        ({"num_experts": [8]}, r"num_experts: expected a positive integer, got \[8\]"),
        ({"model_type": "mixtral"}, "model_type: expected one of llama, qwen3_moe, got 'mixtral'"),
        ({"attention_dropout": 0.1}, "attention_dropout: expected 0"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers: expected at most 10000"),
        ({"rope_scaling": {"rope_type": {"a": 1}}}, "rope_type: expected one of"),
        (
            {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": True}},
            "partial_rotary_factor: expected 1",
        ),
    ],
)
def test_what_is_not_supported_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hf(changed(MOE, **changes))


def test_a_sliding_window_in_llama_is_refused() -> None:
    with pytest.raises(ConfigError, match="sliding_window: expected null, got 4096"):
        config_from_hf(changed(LLAMA, sliding_window=4096))


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_experts", "rope_theta", "vocab_size", "rms_norm_eps", "num_key_value_heads"]
)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: expected"):
        config_from_hf(without(MOE, key))


def test_a_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config.json: expected an object, got list"):
        config_from_hf([1])  # type: ignore[arg-type]


@pytest.mark.parametrize("eos", [0, [0], [2, 13], None])
def test_end_ids_survive_writing(eos: object) -> None:
    config = config_from_hf(changed(MOE, eos_token_id=eos))
    assert config_from_hf(config_to_hf(config)).eos_ids == config.eos_ids
    assert config.eos_ids == (tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))


def test_a_hand_written_config_is_checked_too() -> None:
    config = config_from_hf(LLAMA)
    with pytest.raises(ConfigError, match="d_model: expected a positive integer, got 0"):
        dataclasses.replace(config, d_model=0)
    with pytest.raises(ConfigError, match="rope_type: expected one of default, linear, llama3, got 'yarn'"):
        RopeConfig(1e4, "yarn")
