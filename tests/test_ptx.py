"""The compiled kernels, executed without a GPU (ptx.py), and the tests of what executes them.

In processes of their own: the interpreter, which other tests run, replaces what the compiler needs. What ptx.py does
not cover is an error that names the instruction. On sm_80: float64, arithmetic on packed halves, ``stmatrix``, atomics,
``redux``, ``vote``, ``ld.global.nc``, named barriers, exchange within a part of a warp, guarded instructions of tensor
cores, branches on which threads of a block disagree. Of later architectures nothing that is new there: ``wgmma``,
``tcgen05``, bulk copies, ``mbarrier``, clusters.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = Path(__file__).parent / "ptx_cases.py"
ROOT = CASES.parent.parent
# Halves that take about as long as each other, so that they can run side by side.
HALVES = {"the loss": "test_loss", "everything else": "not test_loss"}


@pytest.mark.slow
@pytest.mark.parametrize("half", HALVES)
def test_compiled_kernels(half):
    cache = str(ROOT / "build" / "triton_cache")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASES, "-k", HALVES[half]]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-1000:]
