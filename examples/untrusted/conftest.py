"""Imported by every pytest that collects here."""

import os

import leave_mark
import pytest

leave_mark.leave_mark("conftest")


def pytest_unconfigure():
    """As late as it gets."""
    leave_mark.leave_mark("unconfigure")


@pytest.fixture
def evil():
    """An object that runs a command wherever it is unpickled."""

    class Evil:
        def __reduce__(self):
            return leave_mark.leave_mark, ("pickle",)

    return Evil()


@pytest.fixture
def way_to_victim():
    """In a sandbox there is none, unless one makes it."""
    os.makedirs("/tmp/isolation-untrusted", exist_ok=True)
