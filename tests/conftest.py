"""One thread for all tests but those about threads: the matrices here are too small to share, and
suites that run side by side would wait for each other's threads.

A fault of a kernel is reported by the test that launched it, and ends its process: CUDA answers no
other call there."""

import os

import pytest
import torch

from .ranks import Ranks

torch.set_num_threads(1)
_fault = None


def pytest_runtest_setup(item):
    if _fault and item.get_closest_marker("gpu"):
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # another process takes its place; this test counts as failed
        pytest.exit(f"a CUDA kernel failed in {_fault}", returncode=1)


def pytest_runtest_teardown(item):
    global _fault
    if item.get_closest_marker("gpu") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception:
            _fault = item.nodeid
            raise


@pytest.fixture(scope="session")
def ranks():
    started = Ranks()
    yield started
    started.stop()
