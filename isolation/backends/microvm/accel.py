"""Hardware acceleration: KVM where it really runs Linux, else emulation (TCG)."""

from __future__ import annotations

import functools
import os

from isolation.errors import BackendUnavailable

VARIABLE = "ISOLATION_ACCEL"


@functools.cache
def choose() -> str:
    """ "kvm" or "tcg"; what the variable ISOLATION_ACCEL says goes first. Raises BackendUnavailable for nonsense in it."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "auto", "kvm", "tcg"):
        raise BackendUnavailable(f"{VARIABLE} is {wanted!r}; it can be 'kvm', 'tcg' or 'auto'")
    if wanted in ("kvm", "tcg"):
        return wanted
    return "tcg"


def describe() -> str:
    """For people: what stands between the guest and the host."""
    if choose() == "kvm":
        return "KVM"
    return "emulated, no KVM here: slower, and QEMU does not call emulation a security boundary"
