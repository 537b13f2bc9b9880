"""A pytest plug-in for pytest's own tests: every pytest that one of them runs inside gets `--isolation=namespace`.

Load it with `-p _inner`, this folder on PYTHONPATH. The outer run, whose process looks at the inner ones, stays as it is.
"""

from __future__ import annotations

from typing import Any

import pytest

_OPTIONS = ("-p", "isolation", "--isolation=namespace")  # these tests load no plug-in but those that they name


def pytest_configure() -> None:
    kind: Any = pytest.Pytester
    inline_run, words = kind.inline_run, kind._getpytestargs

    def isolated_run(self: Any, *arguments: Any, **others: Any) -> Any:
        return inline_run(self, *_OPTIONS, *arguments, **others)

    def isolated_words(self: Any) -> tuple[str, ...]:
        return (*words(self), *_OPTIONS)

    kind.inline_run, kind._getpytestargs = isolated_run, isolated_words
