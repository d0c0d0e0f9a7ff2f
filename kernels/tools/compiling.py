"""One launch through the compiler, without a GPU, and what came out. Uses what the triton wheel carries."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from launches import Launch
from ledger import Made
from triton.backends.compiler import GPUTarget

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# target, bytes of shared memory that one block may have
ARCHITECTURES: dict[str, tuple[GPUTarget, int]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_86": (GPUTarget("cuda", 86, 32), 101376),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}


def compile_launch(launch: Launch, arch: str) -> Made:
    """Compile anew: triton's cache would answer with what an earlier run left there."""
    target, _ = ARCHITECTURES[arch]
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    cache = tempfile.mkdtemp(prefix="aot")
    try:
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = cache
            compiled = triton.compile(launch.source(), target=target, options=options)
    except Exception as error:  # whatever the compiler throws is the finding, and goes into the report
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        return Made(error=f"does not compile: {last.strip()[:160]}")
    finally:
        shutil.rmtree(cache)
    texts = compiled.asm
    registers, spills, instruction = inspect_cuda(texts) if target.backend == "cuda" else inspect_hip(texts)
    return Made(registers, spills, compiled.metadata.shared, instruction)


def inspect_cuda(texts: dict[str, Any]) -> tuple[int, int, str]:
    """Registers, bytes of stack, matrix instruction. These kernels have no arrays: what lies on a stack was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(texts["cubin"])
        file.flush()
        usage = subprocess.run([str(CUOBJDUMP), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = [re.search(rf"\b{name}:(\d+)", usage.stdout + usage.stderr) for name in ("REG", "STACK", "LOCAL")]
    if None in found:
        raise RuntimeError("cuobjdump: expected registers, stack and local, got others. The format changed; mend this.")
    registers, stack, local = (int(match[1]) for match in found if match)
    # read from ptx, each of these stands for one instruction of the machine; disassembling takes longer than compiling
    kinds = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync", "fma": "fma.rn"}
    ptx = texts["ptx"]
    return registers, stack + local, next((name for name, mark in kinds.items() if mark in ptx), "")


def inspect_hip(texts: dict[str, Any]) -> tuple[int, int, str]:
    text = texts["amdgcn"]
    counts = [re.search(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_count", "private_segment_fixed_size")]
    if None in counts:
        raise RuntimeError("amdgcn: expected registers and scratch, got others. The format changed; mend inspect_hip.")
    registers, scratch = (int(match[1]) for match in counts if match)
    return registers, scratch, "mfma" if "v_mfma" in text else ""
