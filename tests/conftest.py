"""Fixtures that several test modules share."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bbbc050() -> Path:
    """Folder of the real mouse embryos (BBBC050); tests that need it are skipped where it is absent."""
    named = os.environ.get("NUCLEI3D_BBBC050")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data" / "bbbc050"
    if not folder.is_dir():
        pytest.skip(f"real embryos not found at {folder}; set NUCLEI3D_BBBC050 to their folder")
    return folder


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Let no file grow beyond 64 kB: the system then refuses to write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
