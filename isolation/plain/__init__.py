"""What we use of the standard library as it was before any project was imported.

Suites replace parts of it, for a test (`monkeypatch.setattr(json, "dumps", …)`) or for good (`gevent.monkey.patch_all()`):
that must not reach what reports for a test, nor who supervises it. A module whose code runs after a project's imports takes
these from here: `from isolation.plain import json, select, socket`. They are copies of the modules' namespaces, made when
this is imported for the first time, which the pytest plug-in does when pytest loads it.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from isolation.plain import jsontext as json

if TYPE_CHECKING:
    import os as os
    import select as select
    import socket as socket
    import subprocess as subprocess
    import threading as threading
    import time as time
else:
    import os
    import select
    import socket
    import subprocess
    import threading
    import time

    from isolation.plain.pairs import BlockingSocket, send_fds, socketpair

    def _copy(module: ModuleType, **more: object) -> ModuleType:
        copy = ModuleType(module.__name__)
        copy.__dict__.update(vars(module), **more)
        return copy

    os = _copy(os)
    select = _copy(select)
    socket = _copy(socket, socket=BlockingSocket, socketpair=socketpair, send_fds=send_fds)
    subprocess = _copy(subprocess)
    threading = _copy(threading)
    time = _copy(time)

__all__ = ["json", "os", "select", "socket", "subprocess", "threading", "time"]
