"""What nbval needs to know about these notebooks."""
import os

# as tools/notebooks.py sets them when outputs are stored; the caller may ask for more threads, as `make test-kernels` does
os.environ |= {"TQDM_DISABLE": "1", "COLUMNS": "80"}
for name, value in {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}.items(): os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items):
    "nbdev_clean removes execution counts; without one, nbval would not compare a cell. Give it one back."
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is not None and cell.get("cell_type") == "code":
            cell.execution_count = 1
