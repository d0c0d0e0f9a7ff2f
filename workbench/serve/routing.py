"""The routing of one answer in compact JSON: which experts every token used in every layer, and with what weights.

    {"format": 1, "layers": [...], "n_experts": E, "k": K, "n_prompt": P, "token_ids": [...],
     "expert_ids":      {"dtype": "int16",   "shape": [pos, layer, k], "data": "base64"},
     "routing_weights": {"dtype": "float32", "shape": [pos, layer, k], "data": "base64"}}

Bytes are little-endian, in row-major order; slots are by descending weight, as everywhere in the workbench.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 1


def routing_record(
    token_ids: Sequence[int],
    n_prompt: int,
    layers: Sequence[int],
    n_experts: int,
    routes: Sequence[tuple[Tensor, Tensor]],  # [pos layer k] each
) -> dict[str, Any]:
    ids = torch.cat([one for one, _ in routes]).to(torch.int16).numpy()
    weights = torch.cat([one for _, one in routes]).float().numpy()
    return {
        "format": FORMAT,
        "layers": list(layers),
        "n_experts": n_experts,
        "k": ids.shape[-1],
        "n_prompt": n_prompt,
        "token_ids": list(token_ids),
        "expert_ids": _packed(ids, "<i2"),
        "routing_weights": _packed(weights, "<f4"),
    }


def routing_arrays(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """expert_ids (int16) and routing_weights (float32) [pos layer k] of a record, for a client."""
    return _unpacked(record["expert_ids"], "<i2"), _unpacked(record["routing_weights"], "<f4")


def _packed(values: np.ndarray, order: str) -> dict[str, Any]:
    data = np.ascontiguousarray(values, dtype=order).tobytes()
    return {"dtype": values.dtype.name, "shape": list(values.shape), "data": base64.b64encode(data).decode()}


def _unpacked(packed: dict[str, Any], order: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["data"]), dtype=order).reshape(packed["shape"])
