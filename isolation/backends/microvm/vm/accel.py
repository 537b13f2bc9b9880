"""Hardware acceleration: KVM where it really boots Linux, else emulation (TCG).

That /dev/kvm opens, and even runs a few instructions, says little: nested and para-virtual hosts offer a KVM on which an
ordinary kernel stalls. So a machine is booted once, with a deadline, and the verdict kept for as long as host and QEMU stay.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.vm import qemu
from isolation.errors import BackendUnavailable, LaunchError
from isolation.plain import json

VARIABLE = "ISOLATION_ACCEL"
_REMEMBERED = "acceleration.json"
_DEVICE = "/dev/kvm"


def choose(cache: Cache, boots: Callable[[], bool]) -> str:
    """ "kvm" or "tcg". The variable ISOLATION_ACCEL goes first; `boots` tries a machine with KVM, and is called only where
    nothing speaks against it and nobody has tried before. Raises BackendUnavailable for nonsense in the variable."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "auto", "kvm", "tcg"):
        raise BackendUnavailable(f"{VARIABLE} is {wanted!r}; it can be 'kvm', 'tcg' or 'auto'")
    if wanted in ("kvm", "tcg"):
        return wanted
    if why_not():
        return "tcg"
    key = f"{_boot_id()} {qemu.find().identity}"
    known = _recall(cache)
    if known.get("key") != key:
        known = {"key": key, "boots": boots()}
        cache.write(_REMEMBERED, json.dumps(known).encode())
    return "kvm" if known.get("boots") is True else "tcg"


def why_not() -> str:
    """What speaks against KVM without a try, and what mends it; "" for nothing."""
    if not os.path.exists(_DEVICE):
        return "there is no /dev/kvm"
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        return "/dev/kvm is not this user's to open (add the user to the group kvm, or chmod 666 /dev/kvm)"
    if os.geteuid() == 0 and os.stat(_DEVICE).st_mode & 0o006 != 0o006:
        return "QEMU does not run as root, and /dev/kvm is for root and its group only (chmod 666 /dev/kvm)"
    if os.path.isdir("/sys/module/kvm_pvm") and not any(
        os.path.isdir(f"/sys/module/{name}") for name in ("kvm_intel", "kvm_amd")
    ):
        return "this host's KVM is para-virtual (kvm_pvm), and boots no ordinary kernel"
    return ""


def describe(name: str) -> str:
    """For people: what stands between the guest and the host."""
    if name == "kvm":
        return "KVM"
    return "emulated, no KVM here: slower, and QEMU does not call emulation a security boundary"


def _recall(cache: Cache) -> dict[str, object]:
    try:
        found = json.loads(cache.read(_REMEMBERED))
    except (OSError, ValueError, LaunchError):
        return {}
    return found if isinstance(found, dict) else {}


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
