"""Does this backend work here, and if not, what mends it: by making a sandbox, and by reading the settings."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Final

from isolation.backends.namespace.host.sandbox import NamespaceMachine
from isolation.backends.namespace.planner import make_plan
from isolation.errors import IsolationError
from isolation.hookspecs import Check, Probe
from isolation.linux import syscalls
from isolation.linux.cgroup import Hierarchy
from isolation.linux.mountinfo import MountTable
from isolation.linux.privileges import LANDLOCK_LEAST_ABI
from isolation.linux.userns import Identity
from isolation.plain import os
from isolation.spec import SandboxSpec

_LEAST_KERNEL = (5, 12)  # mount_setattr(2); overlayfs in user namespaces came with 5.11


_PATIENCE: Final = 60.0  # s; on a busy machine


def probe(features: frozenset[str]) -> Probe:
    """Try the whole chain. Never raises."""
    checks = [_machine(), _kernel(), *_settings(), _proc(), _landlock(), _cgroup()]
    try:
        works, reason = _make_one()
    except (IsolationError, OSError) as error:
        works, reason = False, str(error)
    if not works:
        cures = [check.remedy for check in checks if not check.ok and check.remedy and not check.optional]
        reason = "; ".join([reason, *cures])
    return Probe(works, reason, tuple(checks), features)


def _make_one() -> tuple[bool, str]:
    machine = NamespaceMachine(make_plan(SandboxSpec()))
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            number, _ = machine.start(["/bin/true"], env={}, cwd="/", stdio=[null, null, null])
        finally:
            os.close(null)
        ended = machine.wait(number, _PATIENCE)
    finally:
        machine.close()
    if ended is None or not ended[0].ok:
        return False, f"/bin/true in a sandbox {ended[0] if ended else 'did not end'}"
    who = Identity.of_caller()
    return True, f"a sandbox was made, and a command ran in it ({who.describe()})"


def _machine() -> Check:
    name = platform.machine()
    ok = syscalls.supported_machine()
    return Check("processor", ok, name, "" if ok else "x86_64 and aarch64 are supported")


def _kernel() -> Check:
    release = platform.release()
    version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in release.split("-")[0].split(".")[:2])
    ok = version >= _LEAST_KERNEL
    return Check("kernel", ok, release, "" if ok else "Linux 5.12 or later is needed")


def _settings() -> list[Check]:
    """The switches by which distributions forbid unprivileged user namespaces; read only where they matter."""
    checks = []
    unprivileged = os.geteuid() != 0
    clone = _sysctl("kernel/unprivileged_userns_clone")
    if clone is not None and unprivileged:
        checks.append(
            Check("kernel.unprivileged_userns_clone", clone != "0", clone, "sudo sysctl kernel.unprivileged_userns_clone=1")
        )
    most = _sysctl("user/max_user_namespaces")
    if most is not None:
        checks.append(Check("user.max_user_namespaces", most != "0", most, "sudo sysctl user.max_user_namespaces=15000"))
    apparmor = _sysctl("kernel/apparmor_restrict_unprivileged_userns")
    if apparmor is not None and unprivileged:
        checks.append(
            Check(
                "kernel.apparmor_restrict_unprivileged_userns",
                apparmor == "0",
                apparmor,
                "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 23.10 and later lets programs "
                "make user namespaces, and then denies everything inside; a profile for the Python interpreter "
                "would lift that for every Python program)",
            )
        )
    return checks


def _proc() -> Check:
    """A new /proc may be mounted only where the present one is wholly visible (kernel: mount_too_revealing)."""
    covers = [path for path in MountTable.read().beneath("/proc") if path != "/proc/sys/fs/binfmt_misc"]
    if not covers:
        return Check("/proc", True, "wholly visible")
    if _pid_1().startswith("isolation"):
        remedy = "this is a sandbox that may not make its own: 'isolation run --nesting', or SandboxSpec(nesting=True)"
    else:
        remedy = (
            "this is a container that masks parts of /proc, which forbids a new one inside: podman run --security-opt "
            "unmask=ALL, docker run --security-opt systempaths=unconfined (and a seccomp profile that allows namespaces)"
        )
    return Check("/proc", False, f"{', '.join(covers[:3])}{', …' if len(covers) > 3 else ''} covered", remedy)


def _pid_1() -> str:
    try:
        return Path("/proc/1/comm").read_text()
    except OSError:
        return ""


def _landlock() -> Check:
    abi = syscalls.landlock_abi()
    ok = abi >= LANDLOCK_LEAST_ABI
    found = f"ABI {abi}" if abi else "not in this kernel, or not in its lsm= list"
    remedy = "boot with 'landlock' in the kernel's lsm= list, for a second wall"
    return Check("landlock", ok, found, "" if ok else remedy, optional=True)


def _cgroup() -> Check:
    hierarchy = Hierarchy.find()
    found = ", ".join(sorted(hierarchy.parents)) or "none that this user may write"
    ok = all(hierarchy.can(name) for name in ("memory", "cpu"))
    remedy = (
        "a limit on memory is held by PID 1 instead, cpus cannot be limited; "
        "'systemd-run --user --scope -p Delegate=yes COMMAND' gives a cgroup"
    )
    return Check("cgroup", ok, f"v{hierarchy.version}: {found}" if hierarchy.parents else found, "" if ok else remedy, True)


def _sysctl(name: str) -> str | None:
    try:
        with open(f"/proc/sys/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None
