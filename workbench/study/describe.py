"""What the manifest says: which model, prompts and software a run came from."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import astuple
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

import workbench
from workbench.capture import weights_hash
from workbench.errors import TokenizerError
from workbench.hf_config import config_to_hf
from workbench.io.hub import model_name
from workbench.io.prompts import Prompt
from workbench.io.tokens import Tokenizer
from workbench.models import Llama
from workbench.study.plan import Document, fingerprint


def tokenizer_of(model: Llama) -> Tokenizer:
    """The tokenizer that came with the model; raises TokenizerError when there is none or it does not fit."""
    tokenizer = model.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        raise TokenizerError("model.tokenizer: expected a Tokenizer, got none. Put tokenizer.json beside the weights.")
    if tokenizer.d_vocab > model.cfg.d_vocab:
        raise TokenizerError(
            f"tokenizer: expected at most {model.cfg.d_vocab} ids, as the model has, got {tokenizer.d_vocab}. "
            "Use the tokenizer of this checkpoint."
        )
    return tokenizer


def describe_model(model: Llama, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the model's numbers: hashes, sizes, and the code paths that actually run."""
    cfg = model.cfg
    return {
        "name": model_name(model.source) if model.source else "unnamed",
        "architecture": cfg.model_type,
        "n_params": cfg.n_params,
        "n_layers": cfg.n_layers,
        "n_experts": getattr(cfg, "n_experts", 0),
        "k": getattr(cfg, "k", 0),
        "config_hash": fingerprint(config_to_hf(cfg)),
        "weights_hash": weights_hash(model),
        "tokenizer_hash": tokenizer.hash,
        "stop_ids": list(model.stop_ids),
        "dtype": str(model.dtype).removeprefix("torch."),
        "router_dtype": next(block.mlp.router_dtype for block in model.blocks if hasattr(block.mlp, "router_dtype")),
        "device": model.device.type,
        "moe_impl": model.moe_impl,
        "moe_path": model.moe_path,
        "attn_impl": model.attn_impl,
    }


def describe_prompts(prompts: Sequence[Prompt], documents: Sequence[Document]) -> dict[str, Any]:
    """Hashes of the prompts, and of the token ids they were rendered to."""
    return {
        "prompts_hash": fingerprint([astuple(prompt) for prompt in prompts]),
        "rendered_hash": fingerprint([(document.doc_id, document.ids) for document in documents]),
        "n_prompts": len(prompts),
    }


def describe_sitting(model: Llama) -> dict[str, Any]:
    """When and with which software this process took part; may differ between the sittings of one run."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": model.source,
        "versions": {
            "workbench": workbench.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "polars", "tokenizers")},
        },
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
