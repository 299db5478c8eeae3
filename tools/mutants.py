"""Plant plausible faults, one at a time, and see whether the fast tests notice: `python tools/mutants.py [MODULE ...]`, all by default.

The faults stand in tests/mutants.toml: a module, a text that occurs once in it, what takes its place, and why that is an easy
mistake; and for each module the tests that answer for it. Each fault is planted in a copy and the tests run until the first
failure. A fault that survives is either named there with its reason, or a hole in the tests.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from diffusion_papers.workbench.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 180  # seconds for the tests of one fault
TEST = ["-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--no-header", "--tb=no"]


def table():
    "Tests by module, and faults."
    content = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())
    return content["tests"], content["mutants"]


def copied():
    "A copy of what git tracks, in a folder of its own."
    folder = Path(tempfile.mkdtemp(prefix="mutants_"))
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if not (ROOT / name).is_file(): continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def place(folder, module): return folder.joinpath("diffusion_papers", *module.split(".")).with_suffix(".py")


def passes(folder, tests):
    "Whether these tests pass in a copy; tests that find no end do not."
    quiet = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for test in tests:
        try: code = subprocess.run([sys.executable, *TEST, *test.split(" ", 2)], cwd=folder, env=quiet, timeout=LIMIT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
        except subprocess.TimeoutExpired: return False
        if code == 5: raise SystemExit(f"{test}: there is no such test")
        if code: return False
    return True


def survives(folder, fault, tests):
    "Whether the tests of its module pass although a fault is planted."
    file = place(folder, fault["module"])
    whole = file.read_text()
    try:
        with whole_file(file) as unfinished: unfinished.write_text(whole.replace(fault["text"], fault["replacement"]))
        return passes(folder, tests)
    finally:
        with whole_file(file) as unfinished: unfinished.write_text(whole)


def main(wanted):
    tests, faults = table()
    faults = [fault for fault in faults if not wanted or fault["module"] in wanted]
    folders, began = SimpleQueue(), time.perf_counter()
    for _ in range(2): folders.put(copied())  # two at a time

    def in_a_copy(function, *arguments):
        folder = folders.get()
        try: return function(folder, *arguments)
        finally: folders.put(folder)

    def told(fault):
        lives = in_a_copy(survives, fault, tests[fault["module"]])
        print(f"{'SURVIVED' if lives else 'killed':8s}  {fault['module']}: {fault['why']}", flush=True)
        return lives

    with ThreadPoolExecutor(2) as pool:
        modules = sorted({fault["module"] for fault in faults})
        sound = list(pool.map(lambda module: in_a_copy(passes, tests[module]), modules))
        if not all(sound): sys.exit("without any fault, these tests fail: " + ", ".join(m for m, good in zip(modules, sound) if not good))
        alive = [fault for fault, lives in zip(faults, pool.map(told, faults)) if lives]
    while not folders.empty(): shutil.rmtree(folders.get())
    unexplained = [fault for fault in alive if "survives" not in fault]
    for fault in alive: print(f"survived: {fault['module']}: {fault['why']} ({fault.get('survives', 'no reason is known')})")
    print(f"{len(faults) - len(alive)} of {len(faults)} faults killed, in {(time.perf_counter() - began) / 60:.0f} minutes")
    sys.exit(bool(unexplained) or len(alive) > 0.1 * len(faults))


if __name__ == "__main__": main(sys.argv[1:])
