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
# Side by side, halves that take about as long as each other.
HALVES = {"the loss": "test_loss or odd_offset", "everything else": "not (test_loss or odd_offset)"}


@pytest.fixture(scope="module")
def processes(request):
    cache = request.config.cache.mkdir("ptx")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASES, "-k"]
    root = CASES.parent.parent
    return {
        name: subprocess.Popen(
            [*command, chosen], env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, chosen in HALVES.items()
    }


@pytest.mark.parametrize("half", HALVES)
def test_compiled_kernels(processes, half):
    output, _ = processes[half].communicate()
    assert processes[half].returncode == 0, output[-6000:]
