"""Interventions as values: what to change in a running model, where, and in which order; in JSON too.

Every kind is edits of hook points (`Intervention.edits`), so that what runs is the model's own computation; what the
experts' kernels have an argument for they do themselves (`kernel_plan`).
"""

from __future__ import annotations

from workbench.interventions.activations import (
    AddVector,
    PatchActivations,
    ProjectOut,
    ScaleActivation,
    SetActivation,
)
from workbench.interventions.base import Intervention
from workbench.interventions.buffers import KernelBuffers
from workbench.interventions.experts import ForceExperts, KnockOut, Reweight, ScaleExperts, SetExpertOutput
from workbench.interventions.files import from_json, load_interventions, save_interventions, to_json
from workbench.interventions.routing import BiasRouter, FreezeRouting, SteerRouter, SwapRouting
from workbench.interventions.session import Interventions, PerRow, as_interventions
from workbench.interventions.where import Where

__all__ = [
    "AddVector",
    "BiasRouter",
    "ForceExperts",
    "FreezeRouting",
    "Intervention",
    "Interventions",
    "KernelBuffers",
    "KnockOut",
    "PatchActivations",
    "PerRow",
    "ProjectOut",
    "Reweight",
    "ScaleActivation",
    "ScaleExperts",
    "SetActivation",
    "SetExpertOutput",
    "SteerRouter",
    "SwapRouting",
    "Where",
    "as_interventions",
    "from_json",
    "load_interventions",
    "save_interventions",
    "to_json",
]
