"""Machines that have just booted, saved: every sandbox is a fork of one, so that nobody waits for a boot twice."""

from __future__ import annotations

import os
from pathlib import Path

from isolation.backends.microvm import plan
from isolation.backends.microvm.artifacts import initramfs
from isolation.backends.microvm.artifacts.setup import Images
from isolation.backends.microvm.plan import Plan
from isolation.backends.microvm.vm import qemu
from isolation.backends.microvm.vm.qemu import Boot
from isolation.backends.microvm.vm.snapshot import Key, Snapshot
from isolation.backends.microvm.vm.vm import State, Vm
from isolation.errors import LaunchError
from isolation.plain import threading
from isolation.spec import SandboxSpec

_KIND = "booted"
_KEPT = 4
_PATIENCE = 90.0  # s; a boot takes 4 under emulation, on a machine with nothing else to do
_KVM_PATIENCE = 10.0

_lock = threading.Lock()
_states: dict[str, State] = {}


def state(wanted: Plan) -> State:
    """The saved machine to fork: of this process, from the cache, or booted now. Raises LaunchError."""
    key = key_of(wanted)
    with _lock:
        if key.digest not in _states:
            _states[key.digest] = _from_cache(wanted, key)
        return _states[key.digest]


def key_of(wanted: Plan) -> Key:
    """Everything that a booted machine depends on."""
    image = wanted.images.initramfs()
    layers = [layer.key for layer in wanted.layers]
    return Key.of(wanted.hardware, wanted.images.kernel.digest, image.name, layers, wanted.python)


def drives(wanted: Plan) -> list[int]:
    """Descriptors of the layers, and nothing in the slots yet."""
    return [plan.drive(layer) for layer in wanted.layers] + [plan.placeholder()] * wanted.hardware.slots


def _from_cache(wanted: Plan, key: Key) -> State:
    cache = wanted.images.cache
    found = cache.get(_KIND, key.digest)
    if found is not None:
        try:
            return Snapshot.load(found, key=key, drives=drives(wanted)).state
        except LaunchError:
            cache.remove(_KIND, key.digest)  # damaged; it can be made again
    made: list[State] = []

    def build(target: Path) -> None:
        made.append(boot(wanted))
        Snapshot(made[0], key).save(target)

    path = cache.make(_KIND, key.digest, build, wanted.images.progress)
    cache.prune(_KIND, _KEPT)
    # Another process may have been quicker, while this one waited.
    return made[0] if made else Snapshot.load(path, key=key, drives=drives(wanted)).state


def boots_with_kvm(images: Images) -> bool:
    """Whether KVM here is one that boots Linux, in a time in which emulation would."""
    try:
        wanted = plan.make_plan(SandboxSpec(), images, "kvm")
        boot(wanted, patience=_KVM_PATIENCE).close()
    except LaunchError:
        return False
    return True


def boot(wanted: Plan, patience: float = _PATIENCE) -> State:
    """Boot a machine and save it as its agent is ready; `patience` in seconds. Raises LaunchError."""
    hardware = wanted.hardware
    kernel = os.open(wanted.images.kernel.image, os.O_RDONLY | os.O_CLOEXEC)
    image = os.open(wanted.images.initramfs(), os.O_RDONLY | os.O_CLOEXEC)
    libraries = os.environ.get("LD_LIBRARY_PATH", "")
    words = initramfs.arguments(layers=hardware.layers, size="75%", python=wanted.python, library_path=libraries)
    try:
        start = Boot(kernel, image, f"{qemu.kernel_arguments(hardware)} {words}")
        return Vm.boot(hardware, drives(wanted), start, patience).save()
    finally:
        os.close(kernel)
        os.close(image)
