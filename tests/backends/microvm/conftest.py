"""What is fetched from the distribution is fetched once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isolation.backends.microvm.artifacts import apt, kernel
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.progress import SILENT


@pytest.fixture(scope="session")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache that tests share. ISOLATION_TEST_CACHE names a directory that is kept from one session to the next."""
    if not apt.available():
        pytest.skip("needs apt")
    if os.environ.get("ISOLATION_TEST_OFFLINE"):
        pytest.skip("ISOLATION_TEST_OFFLINE is set")
    kept = os.environ.get("ISOLATION_TEST_CACHE")
    return Cache(Path(kept) if kept else tmp_path_factory.mktemp("downloads"))


@pytest.fixture(scope="session")
def fetched_kernel(downloads: Cache) -> kernel.Kernel:
    return kernel.fetched(downloads, SILENT)
