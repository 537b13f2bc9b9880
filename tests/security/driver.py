"""Hosts with something to be stolen, and ways to run an attack on them. Run as a program, it is a host whose
environment block holds the secret from its first moment on."""

from __future__ import annotations

import functools
import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isolation.backends.namespace import planner as plans
from isolation.backends.namespace.host.sandbox import NamespaceMachine
from isolation.backends.namespace.host.template import NamespaceTemplate
from isolation.backends.namespace.plan import ALL_DEFENCES
from isolation.backends.namespace.planner import make_plan
from isolation.backends.showing import python_environment
from isolation.guest import Guest
from isolation.sandbox import Sandbox
from isolation.spec import Mount, SandboxSpec

SECRET = "correct-horse-battery-staple"


class Host:
    """What there is to be stolen."""

    def __init__(self, directory: Path) -> None:
        self.secret_file = directory / "outside" / "secret.txt"
        self.secret_file.parent.mkdir()
        self.secret_file.write_text(SECRET)
        self.project = directory / "project"
        self.project.mkdir()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.udp.settimeout(0.2)
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix_path = str(self.project / "s")
        self.unix.bind(self.unix_path)
        self.unix.listen()
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0isolation-test-{os.getpid()}")
        self.abstract.listen()
        self.areas: list[int] = []  # addresses of pages of shared memory

    def facts(self) -> Mapping[str, Any]:
        names = [name for name in os.listdir("/proc/self/ns") if not name.endswith("_for_children")]
        return {
            "path": str(self.secret_file),
            "port": self.listener.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "socket": self.unix_path,
            "abstract": f"isolation-test-{os.getpid()}",
            "pid": os.getpid(),
            "secret": SECRET,
            "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in names},
            "host_uid": os.getuid(),
            "masked": plans.MASKED,
            "areas": self.areas,
            "inotify": int(Path("/proc/sys/fs/inotify/max_user_instances").read_text()),
            "executable": os.path.realpath(sys.executable),
        }

    def close(self) -> None:
        for sock in (self.listener, self.udp, self.unix, self.abstract):
            sock.close()


def run_command(host: Host, attack: str, without: str = "", **changes: Any) -> str:
    """Run an attack as a command of its own, in a sandbox without the named defences."""
    spec = SandboxSpec(mounts=[Mount.overlay(host.project)], workdir=str(host.project), **changes)
    plan = make_plan(spec, python=python_environment(), defences=ALL_DEFENCES - set(without.split()))
    machine = NamespaceMachine(plan)
    box = Sandbox.borrowed(machine)
    with box:
        done = box.run([sys.executable, "-c", attack.format_map(host.facts())], timeout=600)
        assert done.returncode == 0, done
        return done.stdout.decode()


def run_fork(host: Host, attack: str, without: str = "", **changes: Any) -> str:
    """Run an attack in a fork of this very process."""
    source = attack.format_map(host.facts())

    def payload(guest: Guest) -> None:
        for _job in guest.forks():
            lines: list[str] = []
            exec(source, {"print": lambda *words, lines=lines: lines.append(" ".join(map(str, words)))})
            guest.send({"lines": lines})

    spec = SandboxSpec(mounts=[Mount.overlay(host.project)], workdir=str(host.project), **changes)
    plan = make_plan(spec, python=python_environment(), defences=ALL_DEFENCES - set(without.split()))
    with NamespaceTemplate(plan, payload) as template, template.fork() as fork:
        message = fork.receive(20)
        assert message is not None, fork.wait(60)
        return "\n".join(message["lines"])


def run_template(host: Host, attack: str, without: str = "", *, forked: bool = False, **changes: Any) -> str:
    """Run an attack where a wide fixture would: in a template that is itself a fork; or (`forked`) in a fork of that."""
    source = attack.format_map(host.facts())

    def payload(guest: Guest) -> None:
        def attempt() -> None:
            lines: list[str] = []
            exec(source, {"print": lambda *words, lines=lines: lines.append(" ".join(map(str, words)))})
            guest.send({"lines": lines})

        for _level in guest.forks():
            if not forked:
                attempt()
            for _job in guest.forks():
                attempt()

    spec = SandboxSpec(mounts=[Mount.overlay(host.project)], workdir=str(host.project), **changes)
    plan = make_plan(spec, python=python_environment(), defences=ALL_DEFENCES - set(without.split()))
    with NamespaceTemplate(plan, payload) as root, root.branch() as branch:
        template = branch.template(20)
        assert template is not None, branch.wait(60)
        if not forked:
            message = branch.receive(20)
        else:
            with template.fork() as fork:
                message = fork.receive(20)
        assert message is not None
        return "\n".join(message["lines"])


RUNNERS = {
    "command": run_command,
    "fork": run_fork,
    "template": run_template,
    "fork-of-fork": functools.partial(run_template, forked=True),
}


def main() -> None:
    """RUNNER ATTACK WITHOUT [inherit]: prints what the attack printed."""
    from security import attacks

    runner, attack, without, *inherit = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        host = Host(Path(directory))
        print(RUNNERS[runner](host, getattr(attacks, attack), without, inherit_env=bool(inherit)))
        host.close()


if __name__ == "__main__":
    main()
