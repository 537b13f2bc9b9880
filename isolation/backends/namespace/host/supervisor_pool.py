"""Who makes the next sandbox: a supervisor of its own, or one that has made its like before.

The first sandbox of a plan gets a supervisor of its own, which ends with it. A process that asks for an equal plan again
gets a supervisor that stays, with the base of the tree built: from then on a new sandbox is a fork of it. It ends with this
process, or by `release`.
"""

from __future__ import annotations

import atexit
import sys
from collections import OrderedDict
from typing import Any

from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.planner import make_plan
from isolation.backends.namespace.rootfs import adoption
from isolation.backends.namespace.supervisor import start
from isolation.backends.namespace.supervisor.handle import SupervisorHandle, commands_only
from isolation.backends.showing import python_environment
from isolation.plain import os, threading
from isolation.spec import SandboxSpec

_SUPERVISORS_AT_MOST = 4
_PLANS_AT_MOST = 64

_lock = threading.Lock()
_owner = os.getpid()
_plans: OrderedDict[Any, Plan] = OrderedDict()
_seen: list[Plan] = []
_supervisors: list[tuple[Plan, SupervisorHandle]] = []


def plan_for(spec: SandboxSpec) -> Plan:
    """`make_plan`, remembered for as long as nothing has changed that it looks at."""
    key = _key(spec)
    with _lock:
        if key in _plans:
            _plans.move_to_end(key)
            return _plans[key]
    plan = make_plan(spec, python=python_environment())
    with _lock:
        _plans[_key(spec)] = plan
        if len(_plans) > _PLANS_AT_MOST:
            _plans.popitem(last=False)
    return plan


def _key(spec: SandboxSpec) -> Any:
    """What a plan depends on."""
    with open("/proc/self/mountinfo", "rb") as file:
        mounts = file.read()
    there = tuple(os.path.exists(mount.source) for mount in spec.mounts)
    adopted = adoption.state(os.path.realpath(mount.source) for mount in spec.mounts if mount.mode == "overlay")
    return spec, mounts, there, adopted, os.geteuid(), tuple(sys.path), len(sys.modules), tuple(os.environ.items())


def supervisor_for(plan: Plan) -> SupervisorHandle:
    """A supervisor to make a sandbox of `plan` with. Raises LaunchError."""
    with _lock:
        _forget_those_of_a_parent()
        for known, process in _supervisors:
            if known == plan and process.alive():
                return process
        if plan not in _seen:
            _seen.append(plan)
            del _seen[:-_PLANS_AT_MOST]
            return start.start(plan)
        process = start.start(plan, commands_only)
        process.shared = True
        if not _supervisors:
            atexit.unregister(release)
            atexit.register(release)  # it would end with this process anyway, but not without a ResourceWarning
        _supervisors.append((plan, process))
        while len(_supervisors) > _SUPERVISORS_AT_MOST:
            _supervisors.pop(0)[1].retire()
        return process


def release() -> None:
    """End the supervisors that stay. Sandboxes that are open end with theirs."""
    with _lock:
        _forget_those_of_a_parent()
        while _supervisors:
            _supervisors.pop()[1].close()
        _seen.clear()


def _forget_those_of_a_parent() -> None:
    """After a fork, the supervisors are the parent's: they live by its pidfd, and speak to it."""
    global _owner
    if _owner != os.getpid():
        _owner = os.getpid()
        _supervisors.clear()
        _seen.clear()
