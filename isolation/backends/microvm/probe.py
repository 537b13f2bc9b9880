"""Does it work here? Asked of every part, not guessed."""

from __future__ import annotations

from isolation import registry
from isolation.backends.microvm import accel, qemu, setup
from isolation.errors import IsolationError
from isolation.hookspecs import Check, Probe


def probe(features: frozenset[str]) -> Probe:
    """QEMU, its own sandbox, the images, and how fast it will be."""
    checks = [_qemu(), _sandbox(), _images(), _accel()]
    failed = [check for check in checks if not check.ok and not check.optional]
    if failed:
        reason = "; ".join(f"{check.found}: {check.remedy}" if check.remedy else check.found for check in failed)
        return Probe(False, reason, tuple(checks), features)
    return Probe(True, f"a virtual machine can be started ({accel.describe()})", tuple(checks), features)


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
        return Check("namespace backend", False, f"does not work: {why}", "QEMU runs in a namespace sandbox; mend that first")
    return Check("namespace backend", True, "works; QEMU runs in it")


def _images() -> Check:
    try:
        images = setup.load()
    except IsolationError as error:
        return Check("images", False, "not there", str(error))
    return Check("images", True, f"kernel {images.kernel.release}, base of {images.base.size >> 20} MiB")


def _accel() -> Check:
    kvm = accel.choose() == "kvm"
    remedy = "a host with KVM (a readable and writable /dev/kvm that boots Linux) runs machines many times faster"
    return Check("acceleration", kvm, accel.describe(), "" if kvm else remedy, optional=True)
