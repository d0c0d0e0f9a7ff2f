"""Run notebooks top to bottom and write their outputs back, the same way each time: `make notebooks`.

    python notebooks/execute.py                     # all of them, two at a time
    python notebooks/execute.py 03 05 --jobs 1      # those whose names begin so

Each runs in a temporary folder, so that nothing it writes stays, with the package of this checkout. What differs from
run to run without meaning anything (times of execution, the interpreter's version) is left out of the file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent
TIMEOUT = 900  # seconds a cell may take; a busy machine is slow


def execute(path: Path) -> tuple[nbformat.NotebookNode, float]:
    """The notebook with fresh outputs, and the processor seconds of its kernel; the file stays as it is.

    Raises nbclient's CellExecutionError.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("__import__('time').process_time()"))
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=TIMEOUT, kernel_name="python3", coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )  # fmt: skip
        client.execute(env=environment(Path(folder)))
    seconds = float(notebook.cells.pop().outputs[0].data["text/plain"])
    return stable(notebook), seconds


def environment(folder: Path) -> dict[str, str]:
    """For the kernel: this checkout first, one thread per process, figures as JSON, its own places for files."""
    here = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels")))
    return {
        **os.environ,
        "PYTHONPATH": here,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PLOTLY_RENDERER": "plotly_mimetype",  # 10 kB a figure; `notebook` would store plotly.js
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",  # progress is no output
        "IPYTHONDIR": str(folder / ".ipython"),
        "TMPDIR": str(folder),
    }


def stable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs between two runs and means nothing."""
    for place, cell in enumerate(notebook.cells):
        cell.id = f"cell-{place:02}"  # a new cell comes with a random id
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return notebook


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen notebooks; the exit code is the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at once (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    paths = [path for path in sorted(FOLDER.glob("*.ipynb")) if path.name.startswith(tuple(chosen.names or [""]))]
    if not paths:
        parser.error(f"names: expected beginnings of files in notebooks/, got {' '.join(chosen.names)}")
    with ThreadPoolExecutor(chosen.jobs) as pool:
        return sum(pool.map(_rewrite, paths))


def _rewrite(path: Path) -> int:
    try:
        notebook, seconds = execute(path)
    except Exception as error:  # of the notebook, whatever it is: the others still run
        print(f"{path.name}: {error}", file=sys.stderr)
        return 1
    nbformat.write(notebook, path)
    print(f"{path.name}: {seconds:.0f} processor seconds, {path.stat().st_size / 1e3:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
