"""What nbval needs to know about these notebooks."""
import os

os.environ |= {"TQDM_DISABLE": "1", "PYTHONHASHSEED": "0"}  # as tools/notebooks.py sets them when outputs are stored
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same, but `make test-kernels` asks for two as well


def pytest_collection_modifyitems(items):
    "nbdev_clean removes execution counts; without one, nbval would not compare a cell. Give it one back."
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is not None and cell.get("cell_type") == "code":
            cell.execution_count = 1
