"""What decides a result besides the cells of a sweep: the model and what is attached to it, the metric, the inputs.

A sweep that is continued, or a finished one that is opened, is the same experiment only if all of this is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.capture import weights_hash
from workbench.errors import ShapeError
from workbench.experiments.metrics import Metric, TokenMetric, metric_name
from workbench.interventions import to_json
from workbench.models import Llama


def describe_model(model: Llama) -> dict[str, Any]:
    """`model` (source, weights, shape), `runs` (how it computes) and `interventions` (what is attached right now).

    It reads all weights: seconds for a large model.
    """
    return {
        "model": {
            "source": model.source,
            "weights": weights_hash(model),
            "config": hashlib.sha256(repr(model.cfg).encode()).hexdigest()[:16],
        },
        "runs": {
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "attn_impl": model.attn_impl,
            "moe_impl": model.moe_impl,
            "moe_path": model.moe_path,
            "router_dtype": getattr(model, "router_dtype", None),
        },
        "interventions": describe_interventions(model),
    }


def describe_interventions(model: Llama) -> list[dict[str, Any]]:
    """The `model.intervene` blocks that are open, outermost first, as in JSON; large tensors by their digests."""
    found = []
    for batch in model.batches:
        tensors: dict[str, Tensor] = {}
        block = {"items": to_json(batch.items, tensors)["interventions"]}
        known = {
            "row": None if batch.row is None else batch.row[0],
            "label": None if batch.label is None else metric_name(batch.label),
            "langs": None if batch.langs is None else list(batch.langs),
            "n_prompt": None if batch.given_n_prompt is None else list(map(int, batch.given_n_prompt)),
            "tensors": {name: digest(tensor) for name, tensor in tensors.items()} or None,
        }
        found.append(block | {name: value for name, value in known.items() if value is not None})
    return found


def describe_metric(metric: Metric) -> dict[str, Any]:
    """`metric`, its name, and `metric_arguments`; those of a caller's own function are unknown (null)."""
    arguments = {**metric.arguments, "pos": metric.pos} if isinstance(metric, TokenMetric) else None
    return {"metric": metric_name(metric), "metric_arguments": arguments}


def digest(*tensors: Tensor | None) -> str:
    """16 hex digits over shapes, dtypes and values; None is told from every tensor."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(b"none\n" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor is not None and tensor.numel():
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def sequences_digest(sequences: Sequence[Sequence[int]]) -> str:
    """Of token sequences, or positions in them, of any lengths."""
    return digest(*(torch.tensor(list(ids), dtype=torch.long) for ids in sequences))


def mask_digest(mask: Tensor | None) -> str | None:
    """A mask counts by what it keeps, not by its dtype; one that keeps everything is none."""
    return None if mask is None or bool(mask.bool().all()) else digest(mask.bool())


def check_choices(**choices: Sequence[Any] | None) -> None:
    """Raises ShapeError when something is named twice, which would count it twice."""
    for name, values in choices.items():
        if values is not None and len(set(values)) < len(values):
            twice = next(value for value in values if list(values).count(value) > 1)
            raise ShapeError(f"{name}: expected each one once, got {twice!r} twice.")
