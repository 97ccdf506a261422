"""``make matrix``: the kernels' tests with the oldest supported, the pinned and the newest torch and triton.

Each set of releases gets an environment of its own below .venv-matrix, five gigabytes, which is removed afterwards.
Says what was installed and what its tests said; what passes is what pyproject.toml may claim.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".venv-matrix"
TOOLS = ["pytest", "pytest-xdist"]
VERSIONS = "import numpy, torch, triton; print('torch', torch.__version__, 'triton', triton.__version__, end=' ')"
VERSIONS += "; print('numpy', numpy.__version__)"

# Kernels by Triton's interpreter and, for GPUs that are not there, by its compiler; beside them the native ones.
KERNELS = ["tests/test_golden.py", "tests/test_maskd_loss.py", "tests/test_streaming_ops.py", "tests/test_launch.py"]
COMPILED = ["tests/test_triton_compilation.py"]
# torch of a CUDA build asks for one triton: the oldest of both are in two environments.
MATRIX = {
    "oldest-torch": (["torch==2.6.0", "numpy==1.24.4"], KERNELS),  # comes with a triton that is too old: CPU only
    "oldest-triton": (["torch==2.8.0", "triton==3.4.0", "numpy<2.4"], KERNELS + COMPILED),
    "pinned": (["--constraint", "constraints.txt", "torch", "triton", "numpy"], KERNELS + COMPILED),
    "newest": (["torch", "triton", "numpy"], KERNELS + COMPILED),
}


def run(name: str, keep: bool) -> str:
    """Installs, tests, removes; the verdict."""
    packages, tests = MATRIX[name]
    python = HOME / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", HOME / name], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages, *TOOLS]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    if subprocess.run(pip, cwd=ROOT, check=False).returncode:
        verdict = "could not be installed"
    else:
        found = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.strip()
        print(f"{name}: {found}", flush=True)
        command = [python, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", "-p", "no:cacheprovider", *tests]
        output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if output.returncode:
            print(output.stdout[-6000:], output.stderr[-2000:])
        verdict = f"{found}: {output.stdout.strip().splitlines()[-1].strip('= ')}"
    if not keep:
        shutil.rmtree(HOME / name)
    return verdict


def main() -> int:
    """All of them, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=MATRIX, help="one environment (default: all)")
    parser.add_argument("--keep", action="store_true", help="leave the environments, and use those that were left")
    options = parser.parse_args()
    verdicts = {name: run(name, options.keep) for name in ([options.only] if options.only else MATRIX)}
    print(*(f"{name}: {verdict}" for name, verdict in verdicts.items()), sep="\n")
    return int(any("failed" in v or "error" in v or "could not" in v for v in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
