"""One thread for all tests but those about threads: the matrices here are too small to share, and
suites that run side by side would wait for each other's threads."""

import pytest
import torch

from .ranks import Ranks

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks():
    started = Ranks()
    yield started
    started.stop()
