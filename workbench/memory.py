"""What a run needs, by calculation, before it begins: weights, cache, records, and what a pass holds at its peak."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workbench.config import ModelConfig
from workbench.errors import ConfigError, ShapeError
from workbench.family import FAMILY, family_member
from workbench.hf_config import config_from_hf
from workbench.io.checkpoint import read_json
from workbench.io.hub import resolve
from workbench.io.quantise import expert_bits, model_bytes
from workbench.models import build_model
from workbench.models.recording import Recorder
from workbench.models.room import Memory, cache_bytes, recorder_bytes, work_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHUNK = 512  # columns of a prompt per pass, where the caller does not say


def predict(
    cfg: ModelConfig,
    context: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    experts: str = "plain",
    batch: int = 1,
    chunk: int = CHUNK,
    record: Sequence[str] = (),
    records_on_disk: bool = True,
) -> Memory:
    """The memory of generating up to `context` positions with a static cache and prompts in chunks.

    `record` as in `model.generate`, `experts` as in `load_model`: "int8" and "int4" hold the experts quantised and all
    else in `dtype`. Raises ShapeError for a context the model does not have, HookError and ConfigError for records that
    do not exist, and ConfigError for quantised experts of a model without experts.
    """
    for name, value in (("context", context), ("batch", batch), ("chunk", chunk)):
        if type(value) is not int or value < 1:
            raise ShapeError(f"{name}: expected at least 1, a whole number, got {value!r}.")
    if context > cfg.n_ctx:
        raise ShapeError(f"context: expected at most {cfg.n_ctx} positions, got {context}. Shorten it.")
    chunk = min(chunk, context)
    size = dtype.itemsize
    return Memory(
        weights=_weights(cfg, experts, size),
        cache=cache_bytes(cfg, batch, context, size),
        records=batch * context * record_bytes(cfg, record, dtype),
        work=work_bytes(cfg, batch, context, chunk, size),
        context=context,
        batch=batch,
        chunk=chunk,
        records_on_disk=records_on_disk,
    )


def record_bytes(cfg: ModelConfig, record: Sequence[str], dtype: torch.dtype) -> int:
    """Bytes per position of what `record` keeps."""
    if not record:
        return 0
    return recorder_bytes(cfg, Recorder(build_model(cfg, dtype, "meta"), record), dtype)


def config_of(name: str) -> ModelConfig:
    """The configuration of a family member (nothing is downloaded), a bundled model or a checkpoint directory."""
    if name.removeprefix("llm-jp/") in FAMILY:
        return family_member(name).config
    return config_from_hf(read_json(resolve(name) / "config.json"))


def _weights(cfg: ModelConfig, experts: str, size: int) -> int:
    bits = expert_bits(experts)
    if bits == 16:
        return cfg.n_params * size
    if not cfg.is_moe:
        raise ConfigError(f"experts: expected plain for a model without experts, got {experts!r}.")
    return model_bytes(cfg, bits, size=size)
