"""The tests themselves do what they can, too; all of them pass, wherever they run."""

import os
import warnings

import leave_mark
import pytest


def test_body():
    leave_mark.leave_mark("test")


def test_pickle(record_property, evil):
    record_property("evil", evil)


def test_warning():
    """Who rebuilds this warning from the name of its class calls os.system."""
    posing = type("system", (UserWarning,), {"__module__": "os"})
    warnings.warn(posing("touch /tmp/isolation-untrusted/warning"), stacklevel=1)


def test_basetemp(way_to_victim, tmp_path):
    """pytest empties the directory that pytest.ini has named."""
    assert tmp_path.is_dir()


@pytest.mark.isolation(enabled=False)
def test_without_a_sandbox_of_its_own():
    """A suite may turn off what is between its tests, but not what is around them."""
    leave_mark.leave_mark("unisolated")


def test_other_files():
    assert not os.path.exists(os.path.expanduser("~/.ssh"))
