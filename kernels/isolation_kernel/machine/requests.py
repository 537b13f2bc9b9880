"""What a kernel in a machine asks its host for: beside what every kernel may ask, checkpoint and rollback."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from isolation.errors import GuestError
from isolation.spec import SandboxSpec
from isolation.template import Template
from isolation.units import format_size
from isolation.wire import Message
from isolation_kernel.container.requests import LATER, Services, checkpoint_name, checkpoint_of, exported
from isolation_kernel.machine.kernel import MachineBox
from isolation_kernel.options import Options


class MachineServices(Services):
    """Answers one kernel. `moved` is called with what the kernel is to hear once its frontends have come back to it."""

    def __init__(
        self, box: MachineBox, options: Options, spec: SandboxSpec, moved: Callable[[Callable[[], None], Message], None]
    ) -> None:
        super().__init__(box, options, spec)  # type: ignore[arg-type]
        self._machine = box
        self._moved = moved
        self._checkpoints: dict[str, Template] = {}

    def _changes(self, _message: Message) -> list[Any]:
        return self._find_changes()  # the machine's agent looks, on the machine's time

    def _all_changes(self) -> list[Any]:
        return self._machine.changes()

    def _refresh(self, _message: Message) -> bool:
        return False  # it has a copy of the notebook's directory

    def _export(self, message: Message) -> object:
        path, target = self._export_paths(message)

        def done(what: int | str) -> None:
            if isinstance(what, int):
                answer: Message = {"answer": exported(target, what)}
            else:
                answer = {"error": f"{os.path.basename(target)} was not exported: {what}"}
            self._machine.wire.send(answer)

        self._machine.fetch(path, target, self.room, done)
        return LATER

    def _checkpoint(self, message: Message) -> object:
        name = checkpoint_name(message, self._checkpoints)
        held = sum(template.held for other, template in self._checkpoints.items() if other != name)
        if held > self._machine.template.memory:
            raise GuestError(
                f"its checkpoints take {format_size(held)} of the host's memory, and the machine itself has "
                f"{format_size(self._machine.template.memory)}: forget one (%isolation forget NAME)"
            )

        def save() -> None:
            made, seconds = self._machine.checkpoint()
            before = self._checkpoints.pop(name, None)
            self._checkpoints[name] = made
            if before is not None:
                before.close()
            self.listen()
            answer["answer"] = {"seconds": round(seconds, 2)}

        answer: Message = {}
        self._moved(save, answer)
        return LATER

    def _rollback(self, message: Message) -> object:
        template = checkpoint_of(message, self._checkpoints)

        def restore() -> None:
            self._machine.move_to(template)
            self.listen()

        back = {"rolled_back": message["name"], **{name: message.get(name) for name in ("request", "idents", "waiting")}}
        self._moved(restore, {"answer": back})
        return LATER

    def _names(self) -> list[str]:
        return list(self._checkpoints)

    def _forget(self, message: Message) -> dict[str, Any]:
        template = checkpoint_of(message, self._checkpoints)
        self._checkpoints = {name: other for name, other in self._checkpoints.items() if other is not template}
        template.close()
        return {}

    def close(self) -> None:
        """Forget all checkpoints."""
        for template in self._checkpoints.values():
            template.close()
        self._checkpoints.clear()
