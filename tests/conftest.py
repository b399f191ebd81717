"""For all tests: OpenMP threads that wait asleep, so that a busy neighbour does not multiply the time."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
