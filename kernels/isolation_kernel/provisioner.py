"""The kernel provisioner: jupyter_client starts the same launcher, but speaks to it by unix sockets in a private directory.

No port is opened, so that no other user can listen in, and nothing is relayed: clients connect to the very sockets that the
kernel accepts on.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from traitlets import Dict

from isolation_kernel.options import Options, parse
from isolation_kernel.pool import client
from isolation_kernel.protocol.connection import CHANNELS, Connection, private_directory, sweep


class Provisioner(LocalProvisioner):
    """Poll, wait, signals and exit code are the launcher's, which passes them on."""

    options = Dict(
        help="Options of the sandbox, over those of the kernelspec: those of `isolation kernel install`, e.g. "
        "{'memory': '2G', 'network': 'none'}. `start_kernel(isolation={…})` has the last word."
    ).tag(config=True)

    process: Any
    cwd: str | None = None
    _directory: str | None = None
    _last: dict[str, Any] | None = None

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Choose the endpoints; a restarted kernel has the same ones."""
        self._last = kwargs.pop("isolation", None)
        manager = self.parent
        if manager is not None:
            if self._directory is None:
                sweep()
                self._directory = private_directory()
            manager.cache_ports = False  # of TCP ports, that is
            manager.transport = "ipc"
            manager.ip = f"{self._directory}/k"
            for number, channel in enumerate(CHANNELS):
                setattr(manager, f"{channel}_port", number + 1)
        launching: dict[str, Any] = await super().pre_launch(**kwargs)
        return launching

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start the launcher, with the options of this kernel."""
        place = cmd.index("-f")
        given = {**self.options, **(self._last or {})}
        words = Options.of(given).words() if given else []
        self._line = parse([*cmd[cmd.index("isolation_kernel") + 1 : place], *words, *cmd[place:]])
        self.cwd = cwd = os.path.abspath(kwargs.get("cwd") or os.getcwd())
        environ = kwargs.get("env") or os.environ
        told = Connection.read(cmd[place + 1]).raw
        first = cmd.index("isolation_kernel") + 1
        adopted = client.ask([*cmd[first:place], *words], cwd, environ, told, cmd[place + 2 :])
        if adopted is None:
            return await super().launch_kernel([*cmd[:place], *words, *cmd[place:]], **kwargs)
        # No process to start: the kernel's own host has it, and does what a launcher would.
        self.process, self.pid, self.pgid = adopted, adopted.pid, None
        return self.connection_info

    async def cleanup(self, restart: bool = False) -> None:
        """Nothing is left of a kernel that will not be restarted."""
        await super().cleanup(restart)
        if self._directory is not None and not restart:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def resolve_path(self, path_str: str) -> str | None:
        """The host's file that a path means inside; None for what is the sandbox's own."""
        if self.cwd is None:
            return None
        cwd = os.path.abspath(os.fspath(self.cwd))
        inside = os.path.normpath(os.path.join(cwd, path_str))
        for mount in self._line.options.spec(cwd, {}).mounts:
            if inside == mount.target or inside.startswith(mount.target + "/"):
                outside = mount.source + inside[len(mount.target) :]
                return outside if os.path.exists(outside) else None
        return None
