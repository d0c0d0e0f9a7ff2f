"""Compile the kernels for every architecture, without a GPU, and fail where the code is not good.

    python kernels/tools/aot_check.py [--jobs 2]                 the ledger, and all of the covering set anew
    python kernels/tools/aot_check.py --cover sm_90,gfx942 --sample 60 --jobs 2              what CI has time for
    python kernels/tools/aot_check.py --record [--anew]          compile what the ledger lacks, or everything
    python kernels/tools/aot_check.py --no-ledger                another triton: compile the covering set alone

Good means: it compiles; nothing spills to memory; shared memory stays within the device's limit; and where a table says
"wgmma", the code has it. aot.csv, the ledger, has what came out for every launch that the host code can make: every
table entry and safe size with every option set. A run fails where a launch has no row or a row with a problem; then it
compiles a covering set again (shipped.py), of all architectures or of those named by --cover, and a sample of all
others that is another one every day (--seed), and fails where something else comes out than the ledger says.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # triton reads it when a kernel is defined
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

import ledger
import triton
from compiling import ARCHITECTURES, compile_launch
from launches import Launch
from shipped import FORMATS, Claim, shipped

SAVE_EVERY = 20  # launches: a recording that is broken off goes on from there


class Job(NamedTuple):
    """One launch on one architecture."""

    arch: str
    launch: Launch
    claim: Claim
    key: str

    @property
    def name(self) -> str:
        return f"{self.arch} {self.claim.label}: {self.launch.name}"

    def problems(self, made: ledger.Made) -> list[str]:
        return ledger.problems(made, ARCHITECTURES[self.arch][1], self.claim.wgmma)

    def row(self, made: ledger.Made) -> ledger.Row:
        return ledger.Row(self.arch, self.launch.name, self.claim.label, made, triton.__version__, self.key)


def all_jobs(archs: tuple[str, ...], formats: tuple[str, ...] = FORMATS) -> list[Job]:
    """Every launch of these architectures once, the covering ones first."""
    jobs = [
        Job(arch, launch, claim, launch.key(arch)) for arch in archs for launch, claim in shipped(arch, formats).items()
    ]
    return sorted(jobs, key=lambda job: not job.claim.covering)


def check_ledger(jobs: list[Job], rows: dict[str, ledger.Row]) -> list[str]:
    """What is wrong with the ledger as it stands: launches without a row, rows with a problem."""
    missing = [job for job in jobs if job.key not in rows]
    found = [f"{job.name}: not in the ledger" for job in missing[:10]]
    if missing:
        found.append(f"{len(missing)} of {len(jobs)} launches are not in the ledger. Run aot_check.py --record.")
    for job in jobs:
        if job.key in rows:
            found += [f"{job.name}: {problem}, says the ledger" for problem in job.problems(rows[job.key].made)]
    return found


def compiled(jobs: list[Job], n_processes: int) -> Iterator[tuple[Job, ledger.Made]]:
    """Each job with what came out, as they finish."""
    if n_processes == 1:
        yield from map(_compile, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(n_processes) as pool:
        yield from pool.imap_unordered(_compile, jobs)


def _compile(job: Job) -> tuple[Job, ledger.Made]:
    return job, compile_launch(job.launch, job.arch)


def compare(done: Iterator[tuple[Job, ledger.Made]], rows: dict[str, ledger.Row], say: Callable[[str], None]) -> bool:
    """Compile, and say what has a problem or is not what its row has; whether all was well."""
    n_done, well = 0, True
    for job, made in done:
        n_done += 1
        found = job.problems(made)
        if job.key in rows and (recorded := rows[job.key].made) != made:
            found.append(f"the ledger has {recorded}, now it is {made}")
        for problem in found:
            well = False
            say(f"{job.name}: {problem}")
    say(f"triton {triton.__version__}: compiled {n_done} launches, {'all well' if well else 'not all well'}")
    return well and n_done > 0


def record(jobs: list[Job], anew: bool, n_processes: int, file: Path, say: Callable[[str], None]) -> bool:
    """Bring the ledger up to date: compile what it lacks, drop what no longer exists; whether all is well."""
    known = ledger.read(file)
    rows = {job.key: job.row(known[job.key].made) for job in jobs if job.key in known and not anew}
    lacking = [job for job in jobs if job.key not in rows]
    say(f"{len(rows)} launches are in the ledger, {len(lacking)} are compiled now")
    for n_done, (job, made) in enumerate(compiled(lacking, n_processes), 1):
        rows[job.key] = job.row(made)
        for problem in job.problems(made):
            say(f"{job.name}: {problem}")
        if n_done % SAVE_EVERY == 0:
            ledger.write(rows, file)
    ledger.write(rows, file)
    say("\n".join(ledger.summary(rows)))
    found = check_ledger(jobs, rows)
    say(f"triton {triton.__version__}: {len(jobs)} launches, {len(found)} with problems")
    return not found and bool(jobs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="comma-separated architectures")
    parser.add_argument("--formats", default=",".join(FORMATS), help="dtype of activations / bits of weights")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--cover", help="architectures whose covering set is compiled (default: those of --arch)")
    parser.add_argument("--sample", type=int, default=0, help="how many launches beside these")
    parser.add_argument("--seed", default=datetime.now(UTC).date().isoformat(), help="of the sample; today's date")
    parser.add_argument("--record", action="store_true", help="compile what the ledger lacks and write it")
    parser.add_argument("--anew", action="store_true", help="with --record: compile what it has as well")
    parser.add_argument("--no-ledger", action="store_true", help="look at what is compiled alone")
    parser.add_argument("--ledger", type=Path, default=ledger.LEDGER, help="the file")
    given = parser.parse_args()
    archs, formats = tuple(given.arch.split(",")), tuple(given.formats.split(","))
    cover = tuple(given.cover.split(",")) if given.cover else archs
    checked = (("--arch", archs, tuple(ARCHITECTURES)), ("--formats", formats, FORMATS), ("--cover", cover, archs))
    for option, names, known in checked:
        if unknown := [name for name in names if name not in known]:
            parser.error(f"{option}: expected among {', '.join(known)}, got {', '.join(unknown)}.")
    if given.record and (archs, formats) != (tuple(ARCHITECTURES), FORMATS):
        parser.error("--record: expected all architectures and formats, got some. The ledger has them all.")

    jobs = all_jobs(archs, formats)
    if given.record:
        return 0 if record(jobs, given.anew, given.jobs, given.ledger, _say) else 1
    rows = {} if given.no_ledger else ledger.read(given.ledger)
    found = [] if given.no_ledger else check_ledger(jobs, rows)
    _say("\n".join([*found, f"{len(jobs)} launches on {', '.join(archs)}; seed {given.seed}"]))
    covering = [job for job in jobs if job.claim.covering and job.arch in cover]
    others = [job for job in jobs if not (job.claim.covering and job.arch in cover)]
    sample = random.Random(given.seed).sample(others, min(given.sample, len(others)))
    well = compare(compiled(covering + sample, given.jobs), rows, _say)
    return 0 if well and not found else 1


def _say(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
