"""Configurations from and to a Hugging Face `config.json`.

Reading is strict. A key this code does not know, a value of the wrong type, or one that the models do not implement
raises a ConfigError that names it: a setting that is silently ignored is a wrong number later on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from workbench.config import LlamaConfig, ModelConfig, Qwen3MoeConfig, RopeConfig
from workbench.errors import ConfigError

# Keys that change nothing in a forward pass: bookkeeping, training-time settings, defaults of generation.
_INERT_KEYS = {
    "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "finetuning_task", "id2label",
    "initializer_range", "label2id", "max_window_layers", "output_attentions", "output_hidden_states",
    "output_router_logits", "problem_type", "return_dict", "tokenizer_class", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip

# Keys that are fine at one value only, because the models implement nothing else.
_ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, None),
    "use_sliding_window": (False,),
    "is_encoder_decoder": (False,),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1,),
}

_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROPE_FIELDS = {"original_max_position_embeddings": "original_n_ctx"}  # of RopeConfig, where its name is another

_MISSING = object()
MAX_LAYERS = 10_000  # more than any model has: beyond it, building the table of tensors would take all memory


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


_KINDS: dict[str, Callable[[Any], bool]] = {
    "a positive integer": lambda value: type(value) is int and value > 0,
    "a number": lambda value: type(value) in (int, float),
    "true or false": lambda value: type(value) is bool,
    "a token id": _is_id,
    "a token id or a list of them": lambda value: _is_id(value) or (type(value) is list and all(map(_is_id, value))),
    "a list of layer numbers": lambda value: type(value) is list and all(map(_is_id, value)),
    "an object": lambda value: isinstance(value, Mapping),
}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read the config.json of a LlamaForCausalLM or Qwen3MoeForCausalLM. Raises ConfigError for anything else in it."""
    if not isinstance(hf, Mapping):
        raise ConfigError(f"config.json: expected an object, got {type(hf).__name__}. Give a checkpoint's own.")
    kinds = {"llama": _llama_from_hf, "qwen3_moe": _qwen3_moe_from_hf}
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in kinds:
        raise ConfigError(
            f"model_type: expected one of {', '.join(kinds)}, got {model_type!r}. Use a checkpoint of these."
        )
    reader = _Reader(hf)
    config = kinds[model_type](reader)
    reader.finish(config.n_layers)
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that transformers 5 reads as the same model."""
    shared = {
        "model_type": config.model_type,
        "vocab_size": config.d_vocab,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.n_ctx,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _rope_to_hf(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
    }
    if not isinstance(config, Qwen3MoeConfig):
        return {"architectures": ["LlamaForCausalLM"], **shared, "mlp_bias": False}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        **shared,
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.k,
        "moe_intermediate_size": config.d_expert,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, sparse in enumerate(config.sparse_layers) if not sparse],
        "router_aux_loss_coef": config.aux_loss_coef,
        "use_sliding_window": False,
    }


class _Reader:
    """Hands out the keys of a config.json and remembers them, so that what nobody asked for can be refused."""

    def __init__(self, hf: Mapping[str, Any]) -> None:
        self.hf = hf
        self.taken: set[str] = {"model_type"}

    def take(self, key: str, kind: str, default: Any = _MISSING) -> Any:
        """The value of `key`, checked to be of a kind in _KINDS; a default stands for an absent key and for null."""
        self.taken.add(key)
        value = self.hf.get(key)
        if value is None and default is not _MISSING:
            return default
        if key not in self.hf:
            raise ConfigError(f"{key}: expected {kind}, got none. Add it to config.json.")
        if not _KINDS[kind](value):
            raise ConfigError(f"{key}: expected {kind}, got {value!r}. Check config.json.")
        return value

    def refuse(self, key: str, expected: str) -> None:
        raise ConfigError(f"{key}: expected {expected}, got {self.hf[key]!r}. The models here do not implement it.")

    def finish(self, n_layers: int) -> None:
        """Refuse what is left: values that are not implemented, and keys that nobody asked for."""
        for key, allowed in _ONLY_VALUE.items():
            self.taken.add(key)
            value = self.hf.get(key, allowed[0])
            flag = isinstance(value, bool) and not any(value is one for one in allowed)  # to Python, True is 1
            if isinstance(value, list | dict) or flag or value not in allowed:
                self.refuse(key, " or ".join(map(repr, allowed)))
        self.taken.add("layer_types")
        if self.hf.get("layer_types") not in (None, ["full_attention"] * n_layers):
            self.refuse("layer_types", f"full_attention in each of {n_layers} layers")
        unknown = sorted(set(self.hf) - self.taken - _INERT_KEYS)
        if unknown:
            raise ConfigError(
                f"{unknown[0]}: expected only keys this code knows, got {self.hf[unknown[0]]!r}"
                f"{f' (and {unknown[1:]})' if unknown[1:] else ''}. Remove it if it changes nothing."
            )


def _llama_from_hf(reader: _Reader) -> LlamaConfig:
    reader.taken.add("sliding_window")
    if reader.hf.get("sliding_window") is not None:
        reader.refuse("sliding_window", "null")
    return LlamaConfig(**_shared_from_hf(reader))


def _qwen3_moe_from_hf(reader: _Reader) -> Qwen3MoeConfig:
    reader.taken.add("sliding_window")  # without use_sliding_window, which must be off, it has no effect
    shared = _shared_from_hf(reader)
    n_layers = shared["n_layers"]
    step = reader.take("decoder_sparse_step", "a positive integer", 1)
    dense = set(reader.take("mlp_only_layers", "a list of layer numbers", []))
    if not dense <= set(range(n_layers)):
        raise ConfigError(f"mlp_only_layers: expected layers below {n_layers}, got {sorted(dense)}. Check config.json.")
    return Qwen3MoeConfig(
        **shared,
        n_experts=_n_experts(reader),
        k=reader.take("num_experts_per_tok", "a positive integer"),
        d_expert=reader.take("moe_intermediate_size", "a positive integer"),
        norm_topk_prob=reader.take("norm_topk_prob", "true or false") if "norm_topk_prob" in reader.hf else False,
        sparse_layers=tuple((layer + 1) % step == 0 and layer not in dense for layer in range(n_layers)),
        aux_loss_coef=reader.take("router_aux_loss_coef", "a number", 0.001),
    )


def _n_experts(reader: _Reader) -> int:
    """One value under two names, the second written by transformers 5; both may be there if they agree."""
    names = [name for name in ("num_experts", "num_local_experts") if name in reader.hf] or ["num_experts"]
    values = [reader.take(name, "a positive integer") for name in names]
    if values[0] != values[-1]:
        raise ConfigError(f"num_experts: expected the same value as num_local_experts, got {values}. Keep one.")
    return int(values[0])


def _shared_from_hf(reader: _Reader) -> dict[str, Any]:
    count = "a positive integer"
    n_heads, d_model = reader.take("num_attention_heads", count), reader.take("hidden_size", count)
    d_vocab = reader.take("vocab_size", count)
    # what transformers makes of its absence differs: all heads in Llama, 4 in Qwen3-MoE, which is not guessed here
    kv_default = (n_heads,) if reader.hf["model_type"] == "llama" else ()
    n_layers = reader.take("num_hidden_layers", count)
    if n_layers > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers: expected at most {MAX_LAYERS}, got {n_layers}. Check config.json.")
    return {
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": reader.take("num_key_value_heads", count, *kv_default),
        "d_head": reader.take("head_dim", count, None) or _split_heads(d_model, n_heads),
        "d_mlp": reader.take("intermediate_size", count),
        "d_vocab": d_vocab,
        "n_ctx": reader.take("max_position_embeddings", count),
        "norm_eps": reader.take("rms_norm_eps", "a number"),
        "rope": _rope_from_hf(reader),
        "tie_embeddings": reader.take("tie_word_embeddings", "true or false", False),
        "bos_id": _special_id(reader, "bos_token_id", d_vocab) if "bos_token_id" in reader.hf else 1,
        "eos_ids": _eos_ids(reader, d_vocab),
        "pad_id": _special_id(reader, "pad_token_id", d_vocab),
    }


def _split_heads(d_model: int, n_heads: int) -> int:
    if d_model % n_heads:
        raise ConfigError(
            f"hidden_size: expected a multiple of {n_heads} heads where there is no head_dim, got {d_model}. "
            "Add head_dim to config.json."
        )
    return d_model // n_heads


def _special_id(reader: _Reader, key: str, d_vocab: int) -> int | None:
    token_id: int | None = reader.take(key, "a token id", None)
    if token_id is not None and token_id >= d_vocab:
        raise ConfigError(f"{key}: expected an id below {d_vocab}, the vocabulary, got {token_id}. Correct it.")
    return token_id


def _eos_ids(reader: _Reader, d_vocab: int) -> tuple[int, ...]:
    given = reader.take("eos_token_id", "a token id or a list of them", []) if "eos_token_id" in reader.hf else 2
    ids = tuple(given) if isinstance(given, list) else (given,)
    if "eos_token_id" in reader.hf and not all(token_id < d_vocab for token_id in ids):
        raise ConfigError(f"eos_token_id: expected ids below {d_vocab}, the vocabulary, got {given!r}. Correct it.")
    return ids


def _rope_from_hf(reader: _Reader) -> RopeConfig:
    """Both spellings: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5)."""
    scaling = reader.take("rope_scaling", "an object", None)
    parameters = reader.take("rope_parameters", "an object", None)
    if scaling and parameters and dict(scaling) != dict(parameters):
        raise ConfigError(
            "rope_scaling: expected to agree with rope_parameters, got both with different values. Keep one."
        )
    given: dict[str, Any] = dict(parameters or scaling or {})
    kind = _rope_kind(given.pop("rope_type", None), given.pop("type", None))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ConfigError(f"rope_type: expected one of {', '.join(_ROPE_KEYS)}, got {kind!r}. No other is implemented.")
    factor = given.pop("partial_rotary_factor", 1)
    if isinstance(factor, bool) or factor != 1:
        raise ConfigError("partial_rotary_factor: expected 1, got another value. Partial rotary is not implemented.")
    theta = _rope_theta(reader.take("rope_theta", "a number", None), given.pop("rope_theta", None))
    if sorted(given) != sorted(_ROPE_KEYS[kind]):
        raise ConfigError(f"rope ({kind}): expected keys {list(_ROPE_KEYS[kind])}, got {sorted(given)}.")
    return RopeConfig(theta=theta, kind=kind, **{_ROPE_FIELDS.get(key, key): value for key, value in given.items()})


def _rope_kind(name: Any, older: Any) -> Any:
    """`rope_type`, or `type` as it was called before; both may be there if they agree, as old releases wrote them."""
    if name is not None and older is not None and name != older:
        raise ConfigError(f"rope_type: expected the same value as type, got {name!r} and {older!r}. Keep one.")
    given = older if name is None else name
    return "default" if given is None else given


def _rope_theta(top: Any, inner: Any) -> Any:
    theta = top if inner is None else inner
    if theta is None or (top is not None and top != theta):
        raise ConfigError(f"rope_theta: expected one value, got {top!r} and {inner!r}. Set it once in config.json.")
    return theta


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """As transformers 5 writes it under `rope_parameters`."""
    values = {key: getattr(rope, _ROPE_FIELDS.get(key, key)) for key in _ROPE_KEYS[rope.kind]}
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **values}
