"""The ahead-of-time compile check: it passes for what ships, and it can fail. In processes of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no build for this platform")
REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "kernels" / "tools" / "aot_check.py"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(TOOL.parent), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)  # hundreds of compilations
def test_what_ships_compiles_well_for_every_architecture() -> None:
    """The ledger has every launch without a problem; two covering sets and a daily sample come out as it says."""
    done = run(str(TOOL), "--cover", "sm_90,gfx942", "--sample", "60", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) launches on sm_80, sm_86, sm_90, sm_100, gfx942", done.stdout)[1]) > 2000
    assert int(re.search(r"compiled (\d+) launches, all well", done.stdout)[1]) > 300


BAD = """
import torch
from compiling import ARCHITECTURES, compile_launch
from launches import layer_launches
from ledger import problems
from workbench_kernels.moe.blocks import safe_blocks

def say(path, tokens, arch, wants_wgmma=False, **gate_up):
    blocks = safe_blocks(path, torch.bfloat16)
    blocks = blocks | {"gate_up": blocks["gate_up"] | gate_up}
    launches = layer_launches(path, tokens, torch.bfloat16, 16, 64, blocks)
    made = compile_launch(next(launch for launch in launches if "gate_up" in launch.name), arch)
    print("; ".join(problems(made, ARCHITECTURES[arch][1], wants_wgmma)) or f"good, {made.instruction}")

say("skinny", 64, "sm_90", True, bk=128, stages=3)
say("tile", 512, "gfx942", bn=128, bk=128, stages=4)
say("tile", 512, "sm_80", bn=256, bk=64, stages=2, warps=4)
say("decode", 1, "sm_90", True)
say("tile", 512, "sm_90", bn=48)
"""


def test_the_check_finds_what_it_looks_for() -> None:
    done = run("-c", BAD)
    assert done.returncode == 0, done.stderr
    good, shared, spills, claim, broken = done.stdout.splitlines()
    assert good == "good, wgmma"
    assert "bytes of shared memory, the limit is 65536" in shared
    assert "bytes spilled" in spills
    assert claim == "claims wgmma, has fma"
    assert broken.startswith("does not compile:")


LEDGER = """
import aot_check, ledger
jobs = aot_check.all_jobs(("sm_90",), ("bfloat16/16",))
good = {job.key: job.row(ledger.Made(64, 0, 1024, "wgmma")) for job in jobs}
claims = next(job for job in jobs if job.claim.wgmma)
assert len(good) == len(jobs) > 100 and jobs[0].claim.covering and not jobs[-1].claim.covering
print(aot_check.check_ledger(jobs, good))
for bad in (ledger.Made(255, 16, 1024, "wgmma"), ledger.Made(64, 0, 10**6, "wgmma"), ledger.Made(64, 0, 9, "mma"),
            ledger.Made(error="does not compile: no")):
    print(*aot_check.check_ledger(jobs, good | {claims.key: claims.row(bad)}))
print(*aot_check.check_ledger(jobs, {key: row for key, row in good.items() if key != claims.key}))

from pathlib import Path
import tempfile
with tempfile.TemporaryDirectory() as folder:
    ledger.write(good, Path(folder) / "aot.csv")
    print(ledger.read(Path(folder) / "aot.csv") == good, ledger.read(Path(folder) / "none.csv"))

mix = next(job for job in jobs if job.launch.name == "combine_kernel")
print(aot_check.compare(aot_check.compiled([mix], 1), {}, print))
print(aot_check.compare(aot_check.compiled([mix], 1), good, print))
"""


def test_a_ledger_that_lacks_a_launch_or_has_a_problem_fails_and_so_does_another_result() -> None:
    done = run("-c", LEDGER)
    assert done.returncode == 0, done.stderr
    well, spilled, shared, claim, broken, missing, read, compiled, alone, differs, compared, other = (
        done.stdout.splitlines()
    )
    assert well == "[]"
    assert "16 bytes spilled, says the ledger" in spilled
    assert "1000000 bytes of shared memory, the limit is 232448, says the ledger" in shared
    assert "claims wgmma, has mma, says the ledger" in claim
    assert "does not compile: no, says the ledger" in broken
    assert re.search(
        r"not in the ledger 1 of \d+ launches are not in the ledger\. Run aot_check.py --record\.", missing
    )
    assert read == "True {}"
    assert "compiled 1 launches, all well" in compiled
    assert alone == "True"
    assert "combine_kernel: the ledger has Made(registers=64" in differs
    assert "compiled 1 launches, not all well" in compared
    assert other == "False"


KEYS = """
import launches, torch
from workbench_kernels import tables
from workbench_kernels.moe import epilogue

blocks = tables.entries("sm_90")[0]["tile"]["257"]
found = launches.layer_launches("tile", 512, torch.bfloat16, 16, 64, blocks, launches.OPTIONS["tapped"])

def keys():
    launches.code.cache_clear()
    return [launch.key("sm_90") for launch in found]

def with_source(old, new):
    before, source = keys(), epilogue.swiglu.src
    assert source.count(old) == 1
    epilogue.swiglu._unsafe_update_src(source.replace(old, new))
    after = keys()
    epilogue.swiglu._unsafe_update_src(source)
    assert keys() == before
    return sorted({launch.name for launch, one, two in zip(found, before, after) if one != two})

print(with_source("1.0 + tl.exp(-gate)", "tl.exp(-gate) + 1.0"))
print(with_source("silu(gate)", "SiLU(gate)"))
print(len({launch.key(arch) for launch in found for arch in ("sm_80", "sm_90")}) == 2 * len(found))
"""


def test_a_changed_kernel_is_another_launch_for_all_that_call_it() -> None:
    done = run("-c", KEYS)
    assert done.returncode == 0, done.stderr
    changed, documented, distinct = done.stdout.splitlines()
    assert changed == "['edited_swiglu_kernel', 'gate_up_kernel']"
    assert documented == "[]"  # comments and docstrings compile to nothing
    assert distinct == "True"


def test_a_table_with_sizes_that_spill_fails_the_run(tmp_path: Path) -> None:
    blocks = {
        "router": {"tokens": 4, "bt": 16, "bk": 64, "splits": 1, "warps": 4, "stages": 2},
        "gate_up": {"bn": 16, "bk": 512, "warps": 1, "stages": 2},  # 256 sums per thread
        "down": {"bn": 8, "bk": 256, "warps": 4, "stages": 2},
        "combine": {"bd": 512, "warps": 4},
    }
    entry = {"device": "*", "triton": "*", "shape": "*", "dtype": "float32", "bits": 8, "tuned": False}
    (tmp_path / "sm_80.json").write_text(json.dumps([entry | {"decode": {"1": blocks}}]))
    done = run(
        str(TOOL), "--no-ledger", "--arch", "sm_80", "--formats", "float32/8", WORKBENCH_KERNELS_CONFIGS=str(tmp_path)
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"sm_80 table decode T=\d+ float32/8 \w+: decode_gate_up_kernel: \d+ bytes spilled", done.stdout)
    assert "not all well" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--arch", "sm_12"), "--arch: expected among sm_80"),
        (("--formats", "int8/3"), "--formats: expected among bfloat16/16"),
        (("--record", "--arch", "sm_90"), "--record: expected all architectures and formats, got some"),
    ],
)
def test_what_cannot_be_asked_is_refused(words: tuple[str, ...], message: str) -> None:
    done = run(str(TOOL), *words)
    assert done.returncode == 2
    assert message in done.stderr
