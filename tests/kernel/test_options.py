"""Which sandbox a kernelspec's words mean, where they leave something out."""

from __future__ import annotations

from pathlib import Path

import pytest
from isolation_kernel import options
from isolation_kernel.options import Options

from isolation import Limits, SpecError


def limits(**said: str) -> Limits:
    return Options(**said).spec(None, {}).limits  # type: ignore[arg-type]


def test_a_kernel_is_bounded_where_nobody_says_anything() -> None:
    found = limits()
    machine = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    assert found.memory is not None
    assert 0.5 * machine < found.memory < 0.85 * machine or found.memory == options.fitting_memory()
    assert found.pids == 4096
    assert found.watched  # and no cgroup is made, nor anybody's process moved, for what nobody has asked for
    assert not limits(memory="2G").watched


def test_a_container_is_smaller_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = options.fitting_memory()
    held, unbounded = tmp_path / "memory.max", tmp_path / "limit"
    held.write_text(f"{1 << 30}\n")
    unbounded.write_text("max\n")
    monkeypatch.setattr(options, "_CONTAINER_MEMORY", (str(unbounded), str(tmp_path / "missing")))
    assert options.fitting_memory() >= whole
    monkeypatch.setattr(options, "_CONTAINER_MEMORY", (str(unbounded), str(held)))
    assert 700 << 20 < options.fitting_memory() < 900 << 20


def test_what_is_said_holds() -> None:
    assert limits(memory="2G", pids="20") == Limits("2G", 20)
    assert limits(memory="none", pids="none") == Limits()
    with pytest.raises(SpecError, match="pids"):
        limits(pids="many")


def test_a_virtual_machine_has_its_own_bounds() -> None:
    assert limits(backend="microvm") == Limits()
    assert limits(backend="microvm", memory="2G") == Limits("2G")
