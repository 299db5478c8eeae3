"""Settings for all tests: no progress bars, one thread a process, so that two processes share two cores in peace."""
import os

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
