"""The main job: prompts through a model, routing captured, statistics and a page."""

from workbench.study.plan import Settings
from workbench.study.report import write_report
from workbench.study.run import run_study

__all__ = ["Settings", "run_study", "write_report"]
