"""Paths that lie in others, and those that only begin alike."""

from __future__ import annotations

import pytest

from isolation.paths import is_within


@pytest.mark.parametrize(
    ("path", "directories", "within"),
    [
        ("/srv/app", ["/srv/app"], True),
        ("/srv/app/tests", ["/srv/app"], True),
        ("/srv/application", ["/srv/app"], False),
        ("/srv", ["/srv/app"], False),
        ("/srv/app", ["/opt", "/srv/"], True),
        ("/srv/app", ["/"], True),
        ("/", ["/"], True),
        ("/", ["/srv"], False),
        ("/srv", [], False),
    ],
)
def test_within(path: str, directories: list[str], within: bool) -> None:
    assert is_within(path, directories) is within
