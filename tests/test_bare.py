"""Where PyTorch, NumPy and pytest are all that is installed, every test passes, or says what it needs."""
import os
import re
import subprocess
import sys
from pathlib import Path

from extras import BARE

ROOT = Path(__file__).resolve().parents[1]


def test_tests_skip_what_needs_an_extra(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE)  # read by every Python process, those that tests start included
    done = subprocess.run([sys.executable, "-m", "pytest", "tests", "--ignore", "tests/test_bare.py", "-rs", "--tb=line", "-p", "no:cacheprovider"],
                          cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert done.returncode == 0, done.stdout[-5000:]
    skipped = re.findall(r"SKIPPED \[(\d+)\] \S+: (.*)", done.stdout)
    assert sum(int(number) for number, _ in skipped) > 10, done.stdout[-5000:]
    assert all(re.search("needs|could not import|not installed", why) for _, why in skipped), skipped
