"""A kernel that has gone back in time answers the request that sent it there.

It was saved in the middle of a cell, `%isolation checkpoint`, which was answered long ago. So that cell's request becomes
the later one, in place: ipykernel has the same objects in its hands while the cell runs, and goes by them when it replies.
"""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import zmq
from IPython.core.error import UsageError
from jupyter_client.jsonutil import json_default

_CARRIED_AT_MOST = 32 << 10  # bytes, half of what a message to the host may be
_KEPT = ("header", "msg_id", "msg_type", "parent_header")


def current(kernel: Any) -> tuple[dict[str, Any], list[str]]:
    """The request of the cell that runs, and who sent it; as JSON."""
    request = kernel.get_parent("shell")
    kept = {name: request[name] for name in _KEPT if name in request}
    found = [base64.b64encode(ident).decode() for ident in _idents(kernel)]
    return json.loads(json.dumps(kept, default=json_default)), found


def waiting(kernel: Any) -> list[list[bytes]]:
    """Requests that have come and are not begun, in their order."""
    found = [[bytes(frame) for frame in message] for message in kernel.waiting.values()]
    inbox = kernel.shell_channel_thread.manager.get_shell_channel_to_subshell_pair(None).to_socket
    with contextlib.suppress(zmq.Again):
        while True:
            found.append(inbox.recv_multipart(zmq.NOBLOCK))
    return found


def wait_again(kernel: Any, requests: list[list[bytes]]) -> None:
    """Put such requests where they are taken from; in a kernel that has not begun, before any others."""
    shell = kernel.shell_channel_thread
    outbox = shell.manager.get_shell_channel_to_subshell_socket(None)  # that thread's
    for frames in requests:
        shell.io_loop.add_callback(outbox.send_multipart, frames)


def as_text(requests: list[list[bytes]]) -> list[list[str]]:
    """For the host, who gives it back to a machine; nothing, if it is too much to carry."""
    if sum(len(frame) for frames in requests for frame in frames) > _CARRIED_AT_MOST:
        return []
    return [[base64.b64encode(frame).decode() for frame in frames] for frames in requests]


def from_text(requests: list[list[str]]) -> list[list[bytes]]:
    """The inverse."""
    return [[base64.b64decode(frame) for frame in frames] for frames in requests]


def become(kernel: Any, request: dict[str, Any], idents: list[str]) -> None:
    """From here on the cell that runs is that one."""
    parent, known = kernel.get_parent("shell"), _idents(kernel)
    parent.update(request)
    known[:] = senders(idents)
    kernel.set_parent(known, parent, channel="shell")


def senders(idents: list[str]) -> list[bytes]:
    """As ipykernel has them, from what `current` says."""
    return [base64.b64decode(ident) for ident in idents]


def _idents(kernel: Any) -> list[bytes]:
    """ipykernel has no public name for it."""
    try:
        found = kernel._shell_parent_ident.get()
    except AttributeError:
        found = getattr(kernel, "_parent_ident", {}).get("shell")
    if not isinstance(found, list):
        raise UsageError("this version of ipykernel does not tell who sent a request; use ipykernel 7")
    return found
