"""The ahead-of-time compile check: it passes for what ships, and it can fail. In processes of its own."""

from __future__ import annotations

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
def test_what_ships_compiles_well_for_every_architecture() -> None:
    """Every shipped entry but float16's, whose sizes are those of bfloat16; `make kernels-aot` compiles all of it."""
    formats = "bfloat16/16,bfloat16/8,bfloat16/4,float32/16"
    done = run(
        str(TOOL), "--cover", "heaviest", "--arch", "sm_80,sm_90,sm_100,gfx942", "--formats", formats, "--jobs", "2"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r": (\d+) launches on sm_80, sm_90, sm_100, gfx942, 0 with problems", done.stdout)[1]) > 200


BAD = """
import aot_check, torch
from launches import layer_launches
from workbench_kernels.moe.blocks import safe_blocks

def problems(path, tokens, arch, wants_wgmma=False, **gate_up):
    blocks = safe_blocks(path, torch.bfloat16)
    blocks = blocks | {"gate_up": blocks["gate_up"] | gate_up}
    launches = layer_launches(path, tokens, torch.bfloat16, 16, 64, blocks, "plain")
    launch = next(launch for launch in launches if "gate_up" in launch.name)
    result = aot_check.check_launch(launch, arch, path, wants_wgmma)
    print("; ".join(result.problems) or f"good, {result.instruction}")

problems("skinny", 64, "sm_90", True, bk=128, stages=3)
problems("tile", 512, "gfx942", bn=128, bk=128, stages=4)
problems("tile", 512, "sm_80", bn=256, bk=64, stages=2, warps=4)
problems("decode", 1, "sm_90", True)
problems("tile", 512, "sm_90", bn=48)
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


def test_an_unknown_architecture_is_refused() -> None:
    done = run(str(TOOL), "--arch", "sm_12")
    assert done.returncode == 2
    assert "--arch: expected among sm_80" in done.stderr
