"""The room that a run takes, in bytes, by calculation; and whether it is there before the run begins."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.config import ModelConfig
from workbench.errors import ConfigError
from workbench.models.recording import Recorder

if TYPE_CHECKING:
    from workbench.models.llama import Llama

GIB = 1 << 30


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
            named = {"weights": self.weights, "cache": self.cache, "work": self.work}
            if not self.records_on_disk:
                named["records"] = self.records
            parts = ", ".join(f"{name} {_gib(n)}" for name, n in named.items() if n)  # those held already are 0
            raise ConfigError(
                f"{what}: expected at least {_gib(self.resident)} ({parts}), got {_gib(available)}. "
                "Shorten the context, take fewer rows or a smaller chunk, or record less."
            )


def check_room(model: Llama, mask: Tensor, n_new: int, chunk: int, growing: bool, recorder: Recorder | None) -> None:
    """Raises ConfigError with the numbers when a generation would hold more than is free, before it begins.

    `mask` [batch pos] is the prompt's. Of a cache that grows, and of records, only the prompt's part counts, since a
    row may end at any time; a static cache counts whole. The work of a pass is an estimate, about a quarter off at
    worst where it was measured: a run that would have just fitted may be refused. Devices other than the CPU and CUDA
    do not say what is free, and are not looked at; limits of a container that the machine does not tell are not seen.
    """
    if model.device.type not in ("cpu", "cuda"):
        return
    batch, n_prompt = mask.shape
    size, on_disk = model.dtype.itemsize, recorder is None or recorder.on_disk
    per_position = 0 if recorder is None else recorder_bytes(model.cfg, recorder, model.dtype)
    held = 0 if recorder is None else _held_bytes(model.cfg, recorder, model.dtype)
    context, columns = n_prompt if growing else n_prompt + n_new, min(chunk, n_prompt)
    masked = chunk < n_prompt or not bool(mask.all())
    needed = Memory(
        weights=0, cache=cache_bytes(model.cfg, batch, context, size), records=batch * n_prompt * per_position,
        work=work_bytes(model.cfg, batch, n_prompt, columns, size, masked, _is_eager(model)) + held * batch * columns,
        context=context, batch=batch, chunk=chunk, records_on_disk=on_disk,
    )  # fmt: skip
    if model.device.type == "cpu":
        needed.check(available_memory(), "memory for generate")
    else:
        replace(needed, records_on_disk=True).check(available_memory(str(model.device)), f"memory of {model.device}")
        replace(needed, cache=0, work=0).check(available_memory(), "memory for records")


def cache_bytes(cfg: ModelConfig, batch: int, context: int, size: int) -> int:
    """Keys and values of all positions, `size` bytes a value."""
    return 2 * cfg.n_layers * batch * context * cfg.n_kv_heads * cfg.d_head * size


def recorder_bytes(cfg: ModelConfig, recorder: Recorder, dtype: torch.dtype) -> int:
    """Bytes per position of what a recorder keeps."""
    k = getattr(cfg, "k", 0)
    routing = len(recorder.layers) * (k * (2 + 4) + 4 * 4)  # int16 ids, float32 weights; entropy, margin, lse, mass
    return routing + sum(_point_bytes(cfg, point.shape, point.dtype, dtype) for point in recorder.points)


def _held_bytes(cfg: ModelConfig, recorder: Recorder, dtype: torch.dtype) -> int:
    """Bytes per position of what a recorder holds of a pass until it is compacted: router logits, ids and weights."""
    routing = len(recorder.layers) * (getattr(cfg, "n_experts", 0) * 4 + getattr(cfg, "k", 0) * (8 + 4))
    return routing + sum(_point_bytes(cfg, point.shape, point.dtype, dtype) for point in recorder.points)


def _is_eager(model: Llama) -> bool:
    scores = (point for name, point in model.hook_dict.items() if name.endswith(("hook_attn_scores", "hook_pattern")))
    return model.attn_impl == "eager" or any(point.listened for point in scores)


def available_memory(device: str = "cpu") -> int:
    """Bytes free now: on a GPU what its driver reports, else the machine's available memory."""
    if device != "cpu":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own to give out
        return int(torch.cuda.mem_get_info(torch.device(device))[0]) + cached
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def work_bytes(
    cfg: ModelConfig, batch: int, context: int, chunk: int, size: int, masked: bool = True, eager: bool = False
) -> int:
    """An estimate: residual stream and its copies, attention, `masked` or not, one MLP, logits of the last column."""
    columns = batch * chunk
    attention = 2 * batch * context * cfg.n_heads * cfg.d_head * size  # keys and values, repeated for every head
    if eager:
        attention += 3 * batch * cfg.n_heads * chunk * context * 4  # scores, masked, and the pattern in float32
    if masked:
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
