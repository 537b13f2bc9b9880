"""Which backend "auto" is, and what is said when it is not the first."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from isolation import registry
from isolation.errors import BackendUnavailable, FeatureMissing
from isolation.hookspecs import CPU_LIMIT, FORK, NETWORK_HOST, NETWORK_NAT, Probe
from isolation.spec import Limits, SandboxSpec

pytestmark = pytest.mark.once


class Fakes:
    """Two backends; what they have, and the answers of their probes."""

    def __init__(self) -> None:
        self.features = {"namespace": {FORK, NETWORK_HOST}, "microvm": {FORK, NETWORK_NAT, CPU_LIMIT}}
        self.probes: dict[str, list[tuple[bool, str]]] = {"namespace": [], "microvm": []}

    def backend(self, name: str) -> Any:
        def probe() -> Probe:
            answers = self.probes[name]
            return Probe(*(answers.pop(0) if answers else (True, "")))

        return SimpleNamespace(name=name, features=lambda: frozenset(self.features[name]), probe=probe)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fakes]:
    made = Fakes()
    monkeypatch.setattr(registry, "_own", made.backend)
    monkeypatch.setattr(registry, "backends", dict)
    registry._works.cache_clear()
    yield made
    registry._works.cache_clear()


def chosen(*features: str, **spec: Any) -> str:
    return registry.choose(SandboxSpec(**spec), features).name


def test_the_first_that_can_do_what_the_spec_needs(fakes: Fakes) -> None:
    assert chosen() == chosen(FORK) == chosen(network="host") == "namespace"
    assert chosen(network="nat") == chosen(limits=Limits(cpus=1)) == "microvm"
    assert registry.passed_over(SandboxSpec(network="nat")) == ["namespace: has no network-nat here"]
    assert registry.passed_over(SandboxSpec()) == []


def test_where_none_can_the_first_that_works_says_why(fakes: Fakes) -> None:
    assert chosen(network="nat", limits=Limits(memory="1G")) == "namespace"
    with pytest.raises(FeatureMissing):
        chosen("something", backend="namespace")
    with pytest.raises(BackendUnavailable, match=r"namespace: has no something here\n  microvm: has no something here"):
        chosen("something")


def test_one_sandbox_that_was_ended_from_outside_is_no_reason(fakes: Fakes) -> None:
    fakes.probes["namespace"] = [(False, "lost")]
    assert chosen() == "namespace"


def test_it_is_told_when_it_is_not_the_first(fakes: Fakes) -> None:
    fakes.probes["namespace"] = [(False, "no user namespaces")] * 2
    assert chosen() == "microvm"
    assert registry.passed_over(SandboxSpec()) == ["namespace: no user namespaces"]
    registry._works.cache_clear()
    fakes.probes = {name: [(False, "broken")] * 2 for name in fakes.probes}
    with pytest.raises(BackendUnavailable, match=r"namespace: broken\n  microvm: broken"):
        chosen()
