"""Does it work here? Asked of every part, not guessed."""

from __future__ import annotations

from collections.abc import Callable

from isolation import registry
from isolation.backends.microvm.artifacts import setup
from isolation.backends.microvm.artifacts.setup import Images
from isolation.backends.microvm.vm import accel, qemu
from isolation.errors import IsolationError
from isolation.hookspecs import Check, Probe


def probe(features: frozenset[str], acceleration: Callable[[Images], str]) -> Probe:
    """QEMU, its own sandbox, the images, and how fast it will be."""
    checks = [_qemu(), _sandbox()]
    try:
        images = setup.load()
    except IsolationError as error:
        checks.append(Check("images", False, "not there", str(error)))
    else:
        found = f"kernel {images.kernel.release}, base of {images.base.size >> 20} MiB"
        checks.append(Check("images", True, found))
    failed = [check for check in checks if not check.ok]
    if failed:
        reason = "; ".join(f"{check.found}: {check.remedy}" if check.remedy else check.found for check in failed)
        return Probe(False, reason, tuple(checks), features)
    name = acceleration(images)
    checks.append(_accel(name))
    return Probe(True, f"a virtual machine can be started ({accel.describe(name)})", tuple(checks), features)


def _qemu() -> Check:
    try:
        found = qemu.find()
    except IsolationError as error:
        return Check("qemu", False, "not usable", str(error))
    return Check("qemu", True, f"{'.'.join(map(str, found.version))} ({found.path})")


def _sandbox() -> Check:
    """QEMU itself runs in a namespace sandbox."""
    found = registry.backends().get("namespace")
    result = found.probe() if found is not None else None
    if result is None or not result.works:
        why = result.reason if result else "not installed"
        return Check("namespace backend", False, f"does not work: {why}", "QEMU runs in one; mend that first")
    return Check("namespace backend", True, "works; QEMU runs in it")


def _accel(name: str) -> Check:
    if name == "kvm":
        return Check("acceleration", True, "KVM boots Linux here", optional=True)
    why = accel.why_not() or "KVM does not boot Linux here"
    remedy = "a host whose KVM boots Linux runs machines many times faster"
    return Check("acceleration", False, f"{why}; {accel.describe(name)}", remedy, optional=True)
