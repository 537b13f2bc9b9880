"""Kernelspecs: what makes frontends offer this kernel, and how they start it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from isolation.errors import SpecError
from isolation.spec import Mount
from isolation_kernel.options import CommandLine, Options, parse

PROVISIONER: Final = "isolation"  # name of our entry point in jupyter_client.kernel_provisioners
_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")
_FILE_AT_MOST: Final = 1 << 16


@dataclass(frozen=True)
class Installed:
    """A kernelspec of ours that Jupyter finds."""

    name: str
    directory: str
    display_name: str
    line: CommandLine


def content(options: Options, display_name: str, *, provisioner: bool) -> dict[str, Any]:
    """kernel.json. The command is the same in any directory and environment: with `-m` alone, Python would import from the
    notebook's directory first, on the host; `-I` forbids that, and an absolute interpreter needs no PATH."""
    python = os.path.abspath(sys.executable)
    metadata: dict[str, Any] = {"debugger": True}
    if not options.in_machine:  # a warm kernel listens before it could be told the keys
        metadata["supported_encryption"] = ["curve"]
    if provisioner:
        metadata["kernel_provisioner"] = {"provisioner_name": PROVISIONER, "config": {}}
    return {
        "argv": [python, "-I", "-m", "isolation_kernel", *options.words(), "-f", "{connection_file}"],
        "display_name": display_name,
        "language": "python",
        "interrupt_mode": "signal",
        "metadata": metadata,
    }


def install(options: Options, name: str, display_name: str, *, user: bool, prefix: str | None, provisioner: bool) -> str:
    """Write a kernelspec; returns its directory. Raises SpecError, OSError."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"a kernel's name is made of letters, digits, '.', '_' and '-'; {name!r} is not")
    from jupyter_client.kernelspec import KernelSpecManager

    with tempfile.TemporaryDirectory() as directory:
        _copy_logos(directory)
        with open(os.path.join(directory, "kernel.json"), "w", encoding="utf-8") as file:
            json.dump(content(options, display_name, provisioner=provisioner), file, indent=1)
            file.write("\n")
        os.chmod(directory, 0o755)
        return str(KernelSpecManager().install_kernel_spec(directory, name, user=user, prefix=prefix))


def absolute(options: Options) -> Options:
    """With paths that mean the same wherever the kernel is started."""
    mounts = []
    for text in options.mount:
        mount = Mount.parse(text)
        if not os.path.exists(mount.source):
            raise SpecError(f"mount source {mount.source!r} does not exist")
        mounts.append(":".join([*(part.replace(":", "\\:") for part in (mount.source, mount.target)), mount.mode]))
    export = options.export and os.path.abspath(options.export)
    if export is not None and not os.path.isdir(export):
        raise SpecError(f"the export directory {export!r} does not exist")
    return replace(options, mount=tuple(mounts), export=export)


def installed() -> list[Installed]:
    """All of ours, by name."""
    from jupyter_client.kernelspec import KernelSpecManager

    found = []
    for name, directory in sorted(KernelSpecManager().find_kernel_specs().items()):
        try:
            with open(os.path.join(directory, "kernel.json"), "rb") as file:
                data = json.loads(file.read(_FILE_AT_MOST))
        except (OSError, ValueError):
            continue
        line = command_line(data)
        if line is not None:
            found.append(Installed(name, directory, str(data.get("display_name")), line))
    return found


def command_line(data: Mapping[str, Any]) -> CommandLine | None:
    """What a kernel.json of ours asks for; None for another's."""
    argv = data.get("argv") if isinstance(data, dict) else None
    if not isinstance(argv, list) or argv[1:4] != ["-I", "-m", "isolation_kernel"]:
        return None
    try:
        return parse([str(word) for word in argv[4:]])
    except SpecError:
        return None


def remove(name: str) -> str:
    """Remove one of ours; returns where it was. Raises SpecError."""
    found = {item.name: item for item in installed()}
    if name not in found:
        known = ", ".join(found) or "none"
        raise SpecError(f"there is no kernel {name!r} of ours; there is: {known}")
    directory = found[name].directory
    if os.path.islink(directory):
        os.unlink(directory)
    else:
        shutil.rmtree(directory)
    return directory


def _copy_logos(directory: str) -> None:
    """ipykernel's, where it is installed here."""
    try:
        from ipykernel.kernelspec import RESOURCES
    except ImportError:
        return
    for name in ("logo-32x32.png", "logo-64x64.png", "logo-svg.svg"):
        path = os.path.join(RESOURCES, name)
        if os.path.isfile(path):
            shutil.copyfile(path, os.path.join(directory, name))
