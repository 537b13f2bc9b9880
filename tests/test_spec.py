"""Specs parse what people write, and refuse nonsense with a sentence."""

from __future__ import annotations

import os

import pytest

from isolation.errors import SpecError
from isolation.spec import Limits, Mount, Network, SandboxSpec
from isolation.units import format_size, parse_seconds, parse_size

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        (4096, 4096),
        ("64K", 65536),
        ("512M", 512 << 20),
        ("512MiB", 512 << 20),
        ("1.5G", 3 << 29),
        ("2 T", 2 << 40),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1", "0", "1X", "M", 0, -5, True, None, 1.5, "9999999T", "1e9"])
def test_bad_sizes(text: object) -> None:
    with pytest.raises(SpecError, match="size"):
        parse_size(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"), [("2s", 2), ("500ms", 0.5), ("5min", 300), ("5m", 300), ("1h", 3600), (0.1, 0.1)]
)
def test_times(text: str | float, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "0", 0, -1, float("inf"), float("nan"), True, "1d"])
def test_bad_times(text: object) -> None:
    with pytest.raises(SpecError, match="time"):
        parse_seconds(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1 << 10, 512 << 20, 3 << 29, 1 << 40])
def test_format_is_the_reverse_of_parse(size: int) -> None:
    assert parse_size(format_size(size)) == size


def test_mounts() -> None:
    assert Mount("data") == Mount(os.path.abspath("data"), os.path.abspath("data"), "ro")
    assert Mount("/a", "/b", writable=True).mode == "rw"
    assert Mount.overlay("/a").mode == "overlay"
    assert Mount.parse("/a") == Mount("/a", "/a")
    assert Mount.parse("/a:/b") == Mount("/a", "/b")
    assert Mount.parse("/a:/b:rw") == Mount("/a", "/b", "rw")
    assert Mount.parse("/a:rw") == Mount("/a", "/a", "rw")
    assert Mount.parse(r"/with\:colon:/b") == Mount("/with:colon", "/b")


@pytest.mark.parametrize("text", ["", ":", "/a:", ":/b", "/a:b", "/a:/b:rx", "/a:/b:/c", "/a:/"])
def test_bad_mounts(text: str) -> None:
    with pytest.raises(SpecError):
        Mount.parse(text)


def test_networks() -> None:
    assert Network.parse("none") == Network.none()
    assert Network.parse("allow:pypi.org,files.pythonhosted.org").hosts == ("pypi.org", "files.pythonhosted.org")
    for bad in ("", "open", "allow", "allow:", "none:x", "allow:a b", 7):
        with pytest.raises(SpecError):
            Network.parse(bad)  # type: ignore[arg-type]


def test_limits_say_what_they_are() -> None:
    limits = Limits(memory="512M", pids=128, cpus=0.5, wall="2s")
    assert limits.describe() == "memory 512M, pids 128, cpus 0.5, wall 2s"
    assert Limits().describe() == "no limits"


@pytest.mark.parametrize(
    "limits", [{"memory": "512"}, {"pids": 0}, {"pids": "many"}, {"cpus": 0}, {"cpus": "all"}, {"disk": 1}, {"wall": -1}]
)
def test_bad_limits(limits: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        Limits(**limits)  # type: ignore[arg-type]


def test_equal_specs_are_equal_and_hashable() -> None:
    first = SandboxSpec(mounts=[Mount("/usr")], env={"B": "2", "A": "1"}, limits=Limits(memory="1G"))
    second = SandboxSpec(mounts=(Mount("/usr"),), env={"A": "1", "B": "2"}, limits=Limits(memory=1 << 30))
    assert first == second
    assert hash(first) == hash(second)
    assert first.replace(network="host").network == Network.host()


@pytest.mark.parametrize(
    "fields",
    [
        {"workdir": "relative"},
        {"env": {"A=B": "x"}},
        {"env": {"A": "x\0"}},
        {"env": {"A": 1}},
        {"mounts": ["/usr"]},
        {"mounts": [Mount("/usr", "/x"), Mount("/etc", "/x")]},
        {"backend": ""},
        {"limits": "512M"},
    ],
)
def test_bad_specs(fields: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        SandboxSpec(**fields)  # type: ignore[arg-type]
