"""Telling the notebook why its kernel has ended, as the last words of the cell that ran.

The kernel can say nothing any more, so its host takes the place of its iopub channel, for as long as a client takes to
connect again. It is not imported before a kernel has died.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import json
import time
import uuid
from collections.abc import Mapping
from typing import Any, Final

import zmq

_PATIENCE: Final = 0.8  # s; libzmq tries again after 0.1 to 0.2
_DELIVERY: Final = 0.3  # s


def publish(endpoint: str, told: Mapping[str, Any], parent: Mapping[str, str], text: str) -> bool:
    """As text on stderr of the request `parent`, to whoever connects to `endpoint` soon; whether somebody has."""
    context = zmq.Context()
    socket = context.socket(zmq.XPUB)
    socket.linger = int(1000 * _DELIVERY)
    try:
        if "curve_secretkey" in told:
            socket.curve_secretkey = str(told["curve_secretkey"]).encode()
            socket.curve_publickey = str(told["curve_publickey"]).encode()
            socket.curve_server = True
        _bind(socket, endpoint)
        if not socket.poll(int(1000 * _PATIENCE)):
            return False
        with contextlib.suppress(zmq.Again):
            while True:
                socket.recv(zmq.NOBLOCK)  # subscriptions
        socket.send_multipart(message(told, parent, text))
        time.sleep(_DELIVERY / 3)  # others may connect a little later
        if socket.poll(0):
            socket.send_multipart(message(told, parent, text))
        return True
    except (zmq.ZMQError, ValueError):
        return False
    finally:
        socket.close()
        context.term()


def _bind(socket: Any, endpoint: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            socket.bind(endpoint)
        except zmq.ZMQError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def message(told: Mapping[str, Any], parent: Mapping[str, str], text: str) -> list[bytes]:
    """A `stream` message of the Jupyter protocol, signed."""
    header = {
        "msg_id": uuid.uuid4().hex,
        "msg_type": "stream",
        "username": "kernel",
        "session": uuid.uuid4().hex,
        "date": datetime.datetime.now(datetime.UTC).isoformat(),
        "version": "5.3",
    }
    parts = [json.dumps(part).encode() for part in (header, dict(parent), {}, {"name": "stderr", "text": text})]
    return [b"stream", b"<IDS|MSG>", _signature(told, parts), *parts]


def _signature(told: Mapping[str, Any], parts: list[bytes]) -> bytes:
    key = str(told.get("key", "")).encode()
    if not key:
        return b""
    scheme = str(told.get("signature_scheme", "hmac-sha256")).removeprefix("hmac-")
    return hmac.new(key, b"".join(parts), getattr(hashlib, scheme)).hexdigest().encode()
