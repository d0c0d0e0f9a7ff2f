"""An OpenAI-compatible server over the hookable models, with interventions and routing per request.

Requests meet in `scheduler`, whose thread alone touches the model; `engine` runs one pass; `app` speaks HTTP. FastAPI
is imported only by the modules that speak HTTP, so that engine and scheduler serve without it.
"""

from __future__ import annotations

from workbench.serve.choice import Ask, Choice
from workbench.serve.engine import Engine
from workbench.serve.limits import Limits
from workbench.serve.routing import routing_arrays
from workbench.serve.scheduler import Scheduler

__all__ = ["Ask", "Choice", "Engine", "Limits", "Scheduler", "routing_arrays"]
