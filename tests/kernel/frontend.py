"""A small frontend: one kernel, and what it says."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jupyter_client.client import KernelClient
from jupyter_client.manager import KernelManager

PATIENCE = 300.0  # s; CI machines are slow, and virtual ones may be emulated


def wait_for_heartbeat(client: KernelClient) -> None:
    """Until it beats; it is taken to until a second has gone by without."""
    deadline = time.monotonic() + PATIENCE
    while not client.hb_channel.is_beating():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Reply:
    """What came of a cell."""

    def __init__(self, reply: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        self.content = reply["content"]
        self.status = self.content["status"]
        self.messages = messages

    @property
    def text(self) -> str:
        """Everything that was printed."""
        return "".join(m["content"]["text"] for m in self.messages if m["msg_type"] == "stream")

    @property
    def error(self) -> str:
        """Name and value of the exception, or what stands for it."""
        return f"{self.content.get('ename')}: {self.content.get('evalue')}"

    @property
    def data(self) -> dict[str, Any]:
        """What was displayed, by type."""
        found: dict[str, Any] = {}
        for message in self.messages:
            found |= message["content"].get("data", {}) if message["msg_type"] in ("display_data", "execute_result") else {}
        return found


class Kernel:
    """A kernel by its kernelspec's name."""

    def __init__(
        self, name: str, cwd: Path, *, extra: tuple[str, ...] = (), encryption: str = "disabled", **start: Any
    ) -> None:
        self.manager = KernelManager(kernel_name=name, transport_encryption=encryption)
        self.manager.start_kernel(cwd=str(cwd), extra_arguments=list(extra), **start)
        self.connect()

    @classmethod
    def of(cls, manager: KernelManager) -> Kernel:
        """One that is started already."""
        kernel = cls.__new__(cls)
        kernel.manager = manager
        kernel.connect()
        return kernel

    def connect(self) -> None:
        self.client = self.manager.client()
        self.client.start_channels()
        try:
            self.client.wait_for_ready(timeout=PATIENCE)
        except BaseException:
            self.close()
            raise

    def restart(self, *, now: bool = False) -> None:
        """And wait until it is connected again."""
        self.manager.restart_kernel(now=now)
        self.wait_until_connected()

    def wait_until_connected(self) -> None:
        """Until iopub is, too, after a restart.

        ZeroMQ connects every socket again by itself, in its own time: who asks on the shell at once may never hear on iopub
        what comes of it, nor that it has ended (of plain kernels as well). What is left on iopub of the kernel before says
        nothing about this one, so `wait_for_ready` of the client, which takes anything for an answer, would not do.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.collect(self.client.kernel_info(), timeout=1)
                return
            except (AssertionError, queue.Empty):
                assert time.monotonic() < deadline, "the kernel does not come back"

    @property
    def pid(self) -> int:
        """Of the launcher."""
        return int(self.manager.provisioner.pid)

    def send(self, code: str, **kwargs: Any) -> str:
        return str(self.client.execute(code, **kwargs))

    def collect(
        self, identity: str, timeout: float = PATIENCE, on_input: Callable[[dict[str, Any]], str] | None = None
    ) -> Reply:
        """The reply to a request that was sent, and what was published with it."""
        deadline = time.monotonic() + timeout
        messages: list[dict[str, Any]] = []
        while True:
            if on_input is not None:
                try:
                    self.client.input(on_input(self.client.get_stdin_msg(timeout=0.05)))
                except queue.Empty:
                    pass
            try:
                message = self.client.get_iopub_msg(timeout=0.05 if on_input else max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                assert time.monotonic() < deadline, "the kernel does not come to an end"
                continue
            if message["parent_header"].get("msg_id") != identity:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
            messages.append(message)
        while True:
            reply = self.client.get_shell_msg(timeout=max(0.01, deadline - time.monotonic()))
            if reply["parent_header"].get("msg_id") == identity:
                return Reply(reply, messages)

    def run(self, code: str, timeout: float = PATIENCE, **kwargs: Any) -> Reply:
        return self.collect(self.send(code, **kwargs), timeout)

    def value(self, expression: str) -> str:
        """What an expression is, as text."""
        reply = self.run(f"print({expression})")
        assert reply.status == "ok", reply.error
        return reply.text.strip()

    def interrupt_a_cell(self) -> Reply:
        """The reply to one that was interrupted once it ran. An interrupt of an idle kernel may be for the next cell: nobody says
        when it arrives."""
        sent = self.send("print('on', flush=True)\nwhile True: __import__('time').sleep(0.01)")
        while self.client.get_iopub_msg(timeout=PATIENCE)["msg_type"] != "stream":
            pass
        self.manager.interrupt_kernel()
        return self.collect(sent)

    def control(self, kind: str, content: dict[str, Any], timeout: float = PATIENCE) -> dict[str, Any]:
        """Ask on the control channel; the reply's content."""
        message = self.client.session.msg(kind, content)
        self.client.control_channel.send(message)
        while True:
            reply = self.client.get_control_msg(timeout=timeout)
            if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                return dict(reply["content"])

    def close(self) -> None:
        self.client.stop_channels()
        if self.manager.has_kernel:
            self.manager.shutdown_kernel(now=True)
        self.manager.context.destroy(linger=0)
        self.client.context.destroy(linger=0)
