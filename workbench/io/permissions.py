"""Who may read a file: what safetensors leaves out."""

from __future__ import annotations

import os
from pathlib import Path


def as_any_new_file(file: Path) -> None:
    """Give `file` the permissions of any new file; safetensors leaves what it writes to its owner alone."""
    umask = os.umask(0)  # it can only be read by setting it
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def check_readable(file: Path) -> None:
    """Raises the system's own OSError; safetensors calls every file that it cannot open a missing one."""
    file.open("rb").close()
