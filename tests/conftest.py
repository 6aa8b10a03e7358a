"""What every test may count on: no network, one thread per worker, the same random numbers on every run."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub at import
os.environ["DMQFX_CACHE"] = tempfile.mkdtemp()  # what was measured on this machine belongs to its user

import exporting
import pytest
import torch
from hypothesis import settings

collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]

settings.register_profile("dmqfx", deadline=None, max_examples=20, print_blob=True)
settings.load_profile("dmqfx")


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist share the cores, so each of them has one."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """A command sets how much dmqfx logs; the next test starts as the first did."""
    logger = logging.getLogger("dmqfx")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """The global generator starts alike in every test, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_export() -> Iterator[None]:
    """Of models that are made alike, in the whole session; test_capture.py has its own of each."""
    with exporting.shared():
        yield
