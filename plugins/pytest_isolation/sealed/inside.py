"""Inside: becomes the pytest that the user has asked for. Run as `python inside.py ORDER [ARGUMENT OF PYTEST]…`.

It runs on the suite's interpreter, whichever that is, so that even an old one gets as far as to say so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from typing import Any

FAILED = 125


def main(order: dict[str, Any], words: list[str]) -> Any:
    """What `sys.exit` takes."""
    if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
        del sys.path[0]  # where the program `pytest` lies, there is nothing to import either
    python = order["python"]
    if sys.version_info < (3, 11):  # noqa: UP036 (not the launcher's interpreter)
        return _fail(f"{python} is Python {sys.version.split()[0]}; 3.11 or later is needed inside")
    try:
        import pytest
    except ImportError as error:
        return _fail(
            f"no pytest for {python} ({error}); install it there ({python} -m pip install pytest), or name the "
            "interpreter of another environment by --python"
        )
    if any(importlib.util.find_spec(name) is None for name in ("isolation", "pytest_isolation")):
        sys.path.append(order["kit"])  # at the end: nothing that the suite has gives way to it
    try:
        importlib.metadata.distribution("isolation-kit")
    except importlib.metadata.PackageNotFoundError:
        sys.meta_path.append(_Shown(order["metadata"]))
    sys.argv = [os.path.join(os.path.dirname(sys.executable), "pytest"), *words]
    # What the program `pytest` calls: `pytest.main` leaves out what that does about a closed pipe, for one.
    for program in importlib.metadata.entry_points(group="console_scripts", name="pytest"):
        return program.load()()
    return pytest.main()


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, texts: dict[str, str]) -> None:
        self._texts = texts

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        return path


class _Shown:
    """Lets importlib.metadata find the launcher's distribution, whose packages are shown here without it."""

    def __init__(self, texts: dict[str, str]) -> None:
        self._found = _Distribution(texts)

    def find_spec(self, *_arguments: Any) -> None:
        """The packages themselves are on sys.path."""

    def find_distributions(self, context: Any = None) -> list[_Distribution]:
        wanted = getattr(context, "name", None)
        return [self._found] if wanted in (None, "isolation-kit", "isolation_kit") else []


def _fail(message: str) -> int:
    sys.stderr.write(f"isolation: {message}\n")
    return FAILED


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
