"""What a run needs, by calculation, before it begins: weights, cache, records, and what a pass holds at its peak."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

GIB = 1 << 30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHUNK = 512  # columns of a prompt per pass, where the caller does not say


@dataclass(frozen=True)
class Memory:
    """Bytes of one generation of `context` positions: `records` lie on disk if `records_on_disk`, all else in memory.

    weights: every parameter. cache: keys and values of all positions. records: what `record` keeps of every position.
    work: an estimate of the largest tensors that are alive together in one pass over `chunk` columns.
    """

    weights: int
    cache: int
    records: int
    work: int
    context: int
    batch: int
    chunk: int
    records_on_disk: bool = True

    @property
    def resident(self) -> int:
        """Bytes that must fit into memory at once."""
        return self.weights + self.cache + self.work + (0 if self.records_on_disk else self.records)

    def table(self, name: str) -> str:
        rows = {
            "weights": self.weights,
            "cache": self.cache,
            f"work ({self.chunk} columns a pass)": self.work,
            "records" + (" (on disk)" if self.records_on_disk else ""): self.records,
            "in memory at once": self.resident,
        }
        width = max(map(len, rows))
        head = f"{name}, {self.batch} x {self.context:,} positions"
        return "\n".join([head, *(f"  {label:<{width}}  {n / GIB:>10.3f} GiB" for label, n in rows.items())])

    def check(self, available: int, what: str = "memory") -> None:
        """Raises ConfigError with the numbers when this does not fit into `available` bytes."""
        if self.resident > available:
            parts = f"weights {_gib(self.weights)}, cache {_gib(self.cache)}, work {_gib(self.work)}"
            if not self.records_on_disk:
                parts += f", records {_gib(self.records)}"
            raise ConfigError(
                f"{what}: expected at least {_gib(self.resident)} ({parts}), got {_gib(available)}. "
                "Shorten the context, take fewer rows or a smaller chunk, or record less."
            )


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
    cache = 2 * cfg.n_layers * batch * context * cfg.n_kv_heads * cfg.d_head * size
    return Memory(
        weights=_weights(cfg, experts, size),
        cache=cache,
        records=batch * context * record_bytes(cfg, record, dtype),
        work=_work(cfg, batch, context, chunk, size),
        context=context,
        batch=batch,
        chunk=chunk,
        records_on_disk=records_on_disk,
    )


def record_bytes(cfg: ModelConfig, record: Sequence[str], dtype: torch.dtype) -> int:
    """Bytes per position of what `record` keeps."""
    if not record:
        return 0
    recorder = Recorder(build_model(cfg, dtype, "meta"), record)
    k = getattr(cfg, "k", 0)
    routing = len(recorder.layers) * (k * (2 + 4) + 4 * 4)  # int16 ids, float32 weights; entropy, margin, lse, mass
    return routing + sum(_point_bytes(cfg, point.shape, point.dtype, dtype) for point in recorder.points)


def available_memory(device: str = "cpu") -> int:
    """Bytes free now: on a GPU what its driver reports, else the machine's available memory."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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


def _work(cfg: ModelConfig, batch: int, context: int, chunk: int, size: int) -> int:
    """Residual stream and its copies, attention with a mask, one MLP, and the logits of the last column."""
    columns = batch * chunk
    attention = 2 * batch * context * cfg.n_heads * cfg.d_head * size  # keys and values, repeated for every head
    attention += batch * chunk * context * (4 + size)  # the mask: bools while it is made, then added to scores
    slots = columns * getattr(cfg, "k", 1)
    widest = max(cfg.d_mlp if not all(getattr(cfg, "sparse_layers", (False,))) else 0, getattr(cfg, "d_expert", 0))
    mlp = slots * (3 * widest + 2 * cfg.d_model) * size
    stream = 6 * columns * max(cfg.d_model, cfg.n_heads * cfg.d_head) * size
    return stream + max(attention, mlp) + batch * cfg.d_vocab * 4


def _point_bytes(cfg: ModelConfig, shape: str, kind: str, dtype: torch.dtype) -> int:
    lengths = {
        "head": cfg.n_heads, "kv_head": cfg.n_kv_heads, "d_model": cfg.d_model, "d_head": cfg.d_head,
        "d_mlp": cfg.d_mlp, "expert": getattr(cfg, "n_experts", 0), "k": getattr(cfg, "k", 0),
        "d_expert": getattr(cfg, "d_expert", 0), "1": 1,
    }  # fmt: skip
    n = 1
    for axis in shape.split()[2:]:  # batch and pos are counted by the caller
        n *= lengths[axis]
    actual = {"model": dtype, "wide": torch.promote_types(dtype, torch.float32)}.get(kind) or getattr(torch, kind)
    return n * actual.itemsize


def _gib(n: int) -> str:
    return f"{n / GIB:.3f} GiB"
