"""Fixtures of the training tests."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import runs  # noqa: E402
import toy  # noqa: E402


@pytest.fixture(scope="session")
def server():
    """Runs training in child processes: `server.run(job, ...)`."""
    with runs.Server() as started:
        yield started


@pytest.fixture
def config():
    return toy.get_config()
