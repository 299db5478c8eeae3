"""Check notebooks with the arithmetic of other processors: `python tools/kernels.py [NOTEBOOK ...]`, all of them by default.

Older vector units and more threads add the same numbers in another order, and the last bits of the sums differ. What a page
prints must not. Each of the four runs compares every output with the stored one, as `make test` does.
"""
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROCESSORS = {  # what PyTorch, its convolutions, and its matrix products and transforms may use
    "no vector units": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}}
CHECK = ["-m", "pytest", "--nbval", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]


def differs(variables, notebooks):
    "Whether a check of the notebooks fails where the environment has these variables; what differs is printed."
    return subprocess.run([sys.executable, *CHECK, *notebooks], cwd=ROOT, env=os.environ | variables).returncode != 0


if __name__ == "__main__":
    notebooks = [str(Path(name).resolve()) for name in sys.argv[1:]] or ["nbs"]
    found = {}
    for (processor, variables), threads in product(PROCESSORS.items(), ("1", "2")):
        run = f"{processor}, threads: {threads}"
        print(f"\n{run}", flush=True)
        found[run] = differs(variables | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}, notebooks)  # who waits leaves the core to the others
    print("\n" + "\n".join(f"{run}: {'DIFFERS' if different else 'the same'}" for run, different in found.items()))
    sys.exit(any(found.values()))
