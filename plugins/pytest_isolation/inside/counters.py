"""What the kernel counts for a sandbox that only the inside can read. A test could lie about it; of itself only."""

from __future__ import annotations

from typing import Any


class Counters:
    """The state at one time."""

    def __init__(self) -> None:
        self._processes = _last_pid()
        self._refused = _without_route()

    def since(self) -> dict[str, Any]:
        """Processes and threads made, and attempts to send where no route leads (no network, that is), until now."""
        return {"processes": max(0, _last_pid() - self._processes), "refused": max(0, _without_route() - self._refused)}


def _last_pid() -> int:
    """The last number given in this PID namespace (proc(5), loadavg)."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            return int(file.read().split()[-1])
    except (OSError, ValueError, IndexError):
        return 0


def _without_route() -> int:
    """IpOutNoRoutes and Ip6OutNoRoutes of this network namespace (kernel: Documentation/networking/snmp_counter.rst)."""
    count = 0
    try:
        with open("/proc/self/net/snmp", encoding="ascii") as file:
            names, values = (line.split() for line in file.readlines()[:2])
        count += int(values[names.index("OutNoRoutes")])
        with open("/proc/self/net/snmp6", encoding="ascii") as file:
            count += sum(int(line.split()[1]) for line in file if line.startswith("Ip6OutNoRoutes"))
    except (OSError, ValueError, IndexError):
        pass
    return count
