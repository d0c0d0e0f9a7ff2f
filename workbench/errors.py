"""Every error the workbench raises on purpose.

Messages read "thing: expected X, got Y. What to do." so that one line tells what was wrong and how to mend it.
"""


class WorkbenchError(Exception):
    """Base of all errors raised on purpose; catch this to catch any of them."""


class ConfigError(WorkbenchError, ValueError):
    """A model configuration holds a value that is unknown, unsupported or contradictory."""


class CheckpointError(WorkbenchError, ValueError):
    """A checkpoint directory is missing, incomplete or does not match its configuration."""


class HookError(WorkbenchError, ValueError):
    """A hook names no hook point, or does something its hook point cannot serve."""


class InterventionError(WorkbenchError, ValueError):
    """An intervention is not well formed, does not fit the model, or lacks what it needs to know where it acts."""


class ShapeError(WorkbenchError, ValueError):
    """A tensor has the wrong shape, dtype or range."""


class TokenizerError(WorkbenchError, ValueError):
    """A tokenizer file cannot be used, or a text or id does not fit it."""


class ChatError(WorkbenchError, ValueError):
    """A conversation cannot be rendered or parsed."""


class PromptError(WorkbenchError, ValueError):
    """A prompt file holds a row that does not fit the schema."""


class RunError(WorkbenchError, ValueError):
    """A run directory is incomplete, foreign, or does not match what is asked of it."""


class FrameError(WorkbenchError, ValueError):
    """A frame lacks columns or rows that a statistic needs, or holds something else."""
