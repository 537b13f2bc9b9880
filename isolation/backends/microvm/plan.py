"""From a spec to a plan: layers, hardware, and what the agent is told, all decided on the host."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from isolation.backends.microvm.artifacts.layers import Layer
from isolation.backends.microvm.artifacts.setup import Images
from isolation.backends.microvm.guest import renew
from isolation.backends.microvm.vm import memory, qemu
from isolation.backends.microvm.vm.qemu import Hardware
from isolation.backends.showing import SYSTEM, environment_for, python_environment
from isolation.errors import FeatureMissing, SpecError
from isolation.paths import is_within
from isolation.plain import time
from isolation.spec import Limits, Mount, SandboxSpec
from isolation.units import format_size

MEMORY = 1 << 30  # bytes, where the spec has no limit
_OWN_MEMORY = 192 << 20  # of the kernel, the agent, and the caches that a limit does not count
_SIZES = [size << 20 for size in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)]
_SLOTS = 4
_MOST_SLOTS = 16


@dataclass(frozen=True)
class Plan:
    """What a machine is made of.

    order  what the agent is told (JSON)
    trees  the images of the mounts, in the order of their slots
    """

    images: Images = field(repr=False)
    hardware: Hardware
    environment: tuple[Layer, ...]
    trees: tuple[Layer, ...]
    order: dict[str, Any] = field(repr=False)
    limits: Limits
    workdir: str
    python: str

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Of the root tree, the lowest first."""
        return (self.images.base, *self.environment)

    def slots(self, hardware: Hardware) -> list[int]:
        """Descriptors for the slots: the trees, and placeholders for the rest."""
        return [drive(tree) for tree in self.trees] + [placeholder()] * (hardware.slots - len(self.trees))

    def describe(self) -> str:
        """For `isolation run --explain`."""
        lines = [
            "backend    microvm",
            f"machine    QEMU {'.'.join(map(str, qemu.find().version))} {self.hardware.machine}, {self.hardware.accel}, "
            f"{self.hardware.cpus} cpu, {format_size(self.hardware.memory)}, in a namespace sandbox of its own",
            f"kernel     {self.images.kernel.release}",
            f"network    {'outgoing connections through QEMU (nat)' if self.hardware.nat else 'own loopback only'}",
            f"limits     {self.limits.describe()}",
            f"workdir    {self.workdir}",
            f"env        {' '.join(sorted(self.order['env']))}",
            "root tree:",
        ]
        lines += [f"  layer {layer.name} ({format_size(layer.size)}): {layer.path}" for layer in self.layers]
        tree = self.order["tree"]
        lines += [f"  mount {entry['target']} ({entry['mode']})" for entry in tree["mounts"]]
        lines += [f"  empty {path}" for path, _mode in tree["private"]]
        return "\n".join(lines)


class _Files:
    """Descriptors of layers, opened once: a machine that is restored must have them whatever the cache drops meanwhile."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def of(self, layer: Layer) -> int:
        path = str(layer.path)
        if path not in self._fds:
            self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._fds[path]

    def placeholder(self) -> int:
        if "" not in self._fds:
            fd = memory.empty(qemu.PLACEHOLDER, "slot")
            self._fds[""] = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)  # QEMU wants no more than it will use
            os.close(fd)
        return self._fds[""]


_open_files = _Files()


def drive(layer: Layer) -> int:
    """A descriptor of a layer's image; this process keeps it."""
    return _open_files.of(layer)


def placeholder() -> int:
    """A descriptor of an empty drive, for a slot that nothing is in."""
    return _open_files.placeholder()


def make_plan(spec: SandboxSpec, images: Images, accel: str) -> Plan:
    """Resolve `spec`; builds the layers that are missing. `accel` is "kvm" or "tcg".

    Raises SpecError, FeatureMissing, LaunchError.
    """
    if spec.image is not None:
        raise FeatureMissing("the microvm backend does not run OCI images yet; leave image=None for the host's tree")
    if spec.network.mode not in ("none", "nat"):
        raise FeatureMissing(
            f"the microvm backend has no network mode {spec.network.mode!r}; it has 'none' (own loopback) and 'nat' "
            f"(outgoing connections)"
        )
    for mount in spec.mounts:
        if mount.mode == "rw":
            raise FeatureMissing(
                f"the microvm backend cannot let writes to {mount.target} reach the host; use an overlay, and copy out"
            )
        if not os.path.exists(mount.source):
            raise SpecError(f"mount source {mount.source!r} does not exist on the host")
    mounts = sorted(spec.mounts, key=lambda mount: mount.target.count("/"))
    if len(mounts) > _MOST_SLOTS:
        raise FeatureMissing(f"the microvm backend can show {_MOST_SLOTS} mounts at most, not {len(mounts)}")
    covered = [mount.target for mount in mounts if mount.source == mount.target]
    places = [mount.target for mount in mounts]
    python = [path for path in python_environment() if not is_within(os.path.realpath(path), covered)]
    environment = images.environment(without=covered)
    trees = tuple(images.tree(mount.source) for mount in mounts)
    hardware = Hardware(
        machine="microvm",
        accel=accel,
        memory=_size(spec.limits.memory),
        cpus=max(1, round((spec.limits.cpus or 1) + 0.49)),
        layers=1 + len(environment),
        slots=_SLOTS if len(mounts) <= _SLOTS else _MOST_SLOTS,
        nat=spec.network.mode == "nat",
    )
    seen = [*(f"/{name}" for name in SYSTEM if name != "opt"), *map(os.path.realpath, python), *places]
    env = environment_for(spec, lambda path: is_within(path, seen))
    home = _place(env.get("HOME", "/"))
    private = _private(env, places)
    kept, links = _kept(python, [path for path, _mode in private])
    links += [("/var/run", "/run"), *_links(env, seen)]
    order = {
        "user": {"uid": os.geteuid(), "gid": os.getegid(), "groups": []},
        "env": env,
        "workdir": spec.workdir,
        "disk": spec.limits.disk,
        "limits": {"memory": spec.limits.memory, "pids": spec.limits.pids, "cpus": spec.limits.cpus},
        "sysctl": {"net/ipv4/ip_unprivileged_port_start": "0", "vm/overcommit_memory": "1"},
        "nat": hardware.nat,
        "tree": {
            "private": private,
            "kept": kept,
            "links": links,
            "home": home,
            "mounts": [_mount(mounts[slot], tree, hardware, slot) for slot, tree in enumerate(trees)],
        },
    }
    if not is_within(os.path.realpath(spec.workdir), [*seen, *(path for path, _mode in private)]) and spec.workdir != "/":
        raise SpecError(
            f"workdir {spec.workdir!r} is not part of the sandbox's file tree; mount it "
            f"(Mount.overlay({spec.workdir!r}), or --mount {spec.workdir})"
        )
    return Plan(images, hardware, environment, trees, order, spec.limits, spec.workdir, sys.executable)


def seed() -> str:
    """For a machine's random numbers, in hexadecimal."""
    return secrets.token_hex(renew.SEED_SIZE)


def now() -> tuple[int, int]:
    """This machine's clock: seconds and nanoseconds."""
    return divmod(time.time_ns(), 1_000_000_000)


def _mount(mount: Mount, tree: Layer, hardware: Hardware, slot: int) -> dict[str, Any]:
    device = f"vd{chr(ord('a') + hardware.layers + slot)}"
    mode = "overlay" if mount.mode == "copy" else mount.mode
    return {"device": device, "target": mount.target, "mode": mode, "directory": tree.name != "file"}


def _size(limit: int | None) -> int:
    """Of the machine's memory. Few sizes, so that machines which were booted before can be used again."""
    wanted = MEMORY if limit is None else limit + _OWN_MEMORY
    for size in _SIZES:
        if size >= wanted:
            return size
    raise FeatureMissing(f"the microvm backend gives a machine {format_size(_SIZES[-1])} of memory at most")


def _private(env: dict[str, str], places: Iterable[str]) -> list[tuple[str, int]]:
    """Empty directories where programs expect to write, unless a mount has them."""
    wanted = {"/tmp": 0o1777, "/var/tmp": 0o1777, "/run": 0o755}
    for name in ("TMPDIR", "TEMP", "TMP", "HOME"):
        path = os.path.normpath(env.get(name, "/"))
        if path.startswith("/") and os.path.realpath(path).strip("/"):
            wanted.setdefault(_place(path), 0o700 if name == "HOME" else 0o1777)
    found = [(path, mode) for path, mode in wanted.items() if not is_within(path, places)]
    return sorted(found, key=lambda entry: entry[0].count("/"))


def _place(path: str) -> str:
    """Where a directory is that a variable names: what leads to it, is there (`_links`)."""
    path = os.path.normpath(path)
    return os.path.realpath(path) if os.path.islink(path) else path


def _links(env: dict[str, str], seen: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Where such a variable names a symbolic link, which is not there by itself."""
    for path in {os.path.normpath(env.get(name, "/")) for name in ("TMPDIR", "TEMP", "TMP", "HOME")}:
        if os.path.islink(path) and not is_within(path, seen):
            yield path, os.path.realpath(path)


def _kept(python: Iterable[str], private: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Parts of the Python environment that lie in private directories: paths, and symbolic links on the way to them."""
    kept: list[str] = []
    links: list[tuple[str, str]] = []
    for path in python:
        parts = path.strip("/").split("/")
        for count in range(1, len(parts) + 1):
            step = "/" + "/".join(parts[:count])
            if os.path.islink(step) and is_within(step, private):
                links.append((step, os.readlink(step)))
                break
        real = os.path.realpath(path)
        if is_within(real, private) and not is_within(real, kept):
            kept.append(real)
    return kept, links
