"""The QEMU program: which one, and the command line of a machine."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from isolation.backends.microvm.artifacts import setup
from isolation.errors import BackendUnavailable
from isolation.hookspecs import FIRST_PASSED
from isolation.plain import subprocess

PORT = "isolation"
PLACEHOLDER = 1 << 40  # bytes of an empty slot; what is put there later may be smaller, not larger
# 32 MiB of translated code per machine: the default is far larger, and each fork touches what it has.
_TCG_CACHE = 32
_PASSTHROUGH = "obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class Qemu:
    """path, version as numbers, and an identity that changes with the binary."""

    path: str
    version: tuple[int, ...]
    identity: str


@dataclass(frozen=True)
class Hardware:
    """Everything that a restored machine must have in common with the saved one.

    memory in bytes; layers: read-only drives of the root tree; slots: drives that a fork may put something else in
    """

    machine: str
    accel: str
    memory: int
    cpus: int
    layers: int
    slots: int
    nat: bool = False


@functools.cache
def find() -> Qemu:
    """The installed one. Raises BackendUnavailable, naming the package."""
    path = setup.qemu()
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendUnavailable(f"{path} does not run: {error}") from error
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", done.stdout)
    if match is None:
        raise BackendUnavailable(f"{path} --version says nothing about a version: {done.stdout or done.stderr!r}")
    version = tuple(int(part or 0) for part in match.groups())
    if version < (7, 0, 0):
        raise BackendUnavailable(f"{path} is version {done.stdout.split()[3]}; 7.0 or later is needed")
    status = os.stat(os.path.realpath(path))
    identity = [os.path.realpath(path), ".".join(map(str, version)), str(status.st_size), str(status.st_mtime_ns)]
    return Qemu(path, version, " ".join(identity))


class Descriptors:
    """Hands out the numbers that a list of descriptors will have in the sandbox (FIRST_PASSED and up)."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def give(self, fd: int) -> int:
        """The number of `fd` inside."""
        self.fds.append(fd)
        return FIRST_PASSED + len(self.fds) - 1


@dataclass(frozen=True)
class Boot:
    """What only a machine that boots needs: descriptors of the kernel and the initramfs, and the kernel's command line."""

    kernel: int
    initramfs: int
    append: str


def command(
    qemu: Qemu,
    hardware: Hardware,
    descriptors: Descriptors,
    *,
    qmp: int,
    agent: int,
    console: int,
    memory: int,
    drives: Sequence[int],
    shared: bool,
    boot: Boot | None,
) -> list[str]:
    """argv. `shared`: writes reach `memory`, which is how a template is saved; else they are private to this machine."""
    give = descriptors.give
    mib = hardware.memory >> 20
    microvm = hardware.machine == "microvm"
    machine = "microvm" if microvm else "q35,hpet=off,smm=off,vmport=off,sata=off,smbus=off,usb=off,graphics=off"
    bus = "device" if microvm else "pci"
    accel = f"tcg,tb-size={_TCG_CACHE}" if hardware.accel == "tcg" else hardware.accel
    words = [
        qemu.path, "-M", f"{machine},memory-backend=ram", "-accel", accel,
        "-cpu", "max" if hardware.accel == "tcg" else "host", "-smp", str(hardware.cpus), "-m", str(mib),
        "-nodefaults", "-no-user-config", "-no-reboot", "-nographic",
        "-sandbox", f"on,{_PASSTHROUGH}",
        "-object", f"memory-backend-file,id=ram,size={mib}M,mem-path=/proc/self/fd/{give(memory)},"
                   f"share={'on' if shared else 'off'}",
        "-chardev", f"socket,id=q,fd={give(qmp)}", "-mon", "chardev=q,mode=control",
        "-chardev", f"socket,id=a,fd={give(agent)}",
        "-chardev", f"socket,id=c,fd={give(console)}", "-serial", "chardev:c",
    ]  # fmt: skip
    for number, fd in enumerate(drives):
        # By a set of descriptors, which QEMU duplicates: opening a path again would ask for permission again.
        words += ["-add-fd", f"fd={give(fd)},set={number}"]
        drive = f"id=d{number},file=/dev/fdset/{number},format=raw,if=none,readonly=on,cache=unsafe,aio=threads"
        words += ["-drive", f"{drive},file.locking=off", "-device", f"virtio-blk-{bus},drive=d{number}"]
    words += [
        "-device", f"virtio-serial-{bus},max_ports=2", "-device", f"virtserialport,chardev=a,name={PORT}",
        "-device", f"virtio-rng-{bus}",
    ]  # fmt: skip
    if hardware.nat:
        words += ["-netdev", "user,id=n,ipv6=off", "-device", f"virtio-net-{bus},netdev=n"]
    if boot is None:
        words += ["-incoming", "defer"]
    else:
        words += ["-kernel", f"/proc/self/fd/{give(boot.kernel)}", "-initrd", f"/proc/self/fd/{give(boot.initramfs)}"]
        words += ["-append", boot.append]
    return words


def kernel_arguments(hardware: Hardware) -> str:
    """What every machine's kernel is told, besides the initramfs's words."""
    words = "console=ttyS0 quiet reboot=t panic=-1 mitigations=off random.trust_cpu=on"
    khz = tsc_khz()
    if hardware.accel == "tcg" and khz:
        # Under TCG the guest's counter is the host's, and this machine has no timer to calibrate it with: without these
        # words the boot hangs on a loaded host.
        words += f" tsc_early_khz={khz} tsc=reliable"
    return words


@functools.cache
def tsc_khz() -> int:
    """The rate of this processor's time-stamp counter; 0 where it is not constant. A saved machine is bound to it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return 0
    rate = re.search(r"^bogomips\s*:\s*([\d.]+)", text, re.MULTILINE)
    return round(float(rate[1]) / 2 * 1000) if rate and "constant_tsc" in text else 0
