"""What plug-ins and conftest files put on a test's report (`report.owner = "me"`): it crosses, as plain values.

On the host it is data of a test's, as its output is: whoever reads it there decides what it means. Names that pytest itself
gives a meaning to cannot be set, and what is known to be used for more than text is looked at more closely.
"""

from __future__ import annotations

import functools
import html
import inspect
import re
from typing import Any

import pytest

from isolation.plain import json
from pytest_isolation.wire.sanitize import clean_name
from pytest_isolation.wire.values import NotPlain, pack, unpack

_AT_MOST = 100  # of one report
_OURS = ("_isolation", "isolation_")
_OF_XDIST = frozenset(("node", "item_index", "worker_id", "testrun_uid"))  # which worker a report has come from
_OF_HTML = ("extras", "extra")  # pytest-html, and others in its place
_OF_JSON_REPORT = "_json_report_extra"
_EXTENSION = re.compile(r"[A-Za-z0-9]{1,16}")
_MIME_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+")
_LINK = re.compile(r"(?:https?:|ftp:|file:|mailto:|data:image/)|(?![A-Za-z][A-Za-z0-9+.-]*:)", re.IGNORECASE)


class BadAttribute(ValueError):
    """No report has such a one."""


def take(report: pytest.TestReport, data: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    """In the sandbox: the attributes that cross, as JSON, and the names (with the type) of those that cannot. Both are taken
    out of `data`, what pytest has made of the report."""
    found: dict[str, Any] = {}
    left: list[list[str]] = []
    kind: Any = type(report)
    own = _names_of(kind)
    for name, value in list(report.__dict__.items()):
        if name in own or not _is_free(name):
            continue
        data.pop(name, None)
        try:
            if len(found) == _AT_MOST:
                raise NotPlain(f"more than {_AT_MOST}")
            found[name] = pack(value)
        except Exception as error:  # of a class that only looks plain
            left.append([name, str(error) if isinstance(error, NotPlain) else type(value).__name__])
    return found, left[:_AT_MOST]


def put(report: pytest.TestReport, sent: object) -> None:
    """On the host: `sent` are the attributes of `report`, which has all else. Raises BadAttribute."""
    if not isinstance(sent, dict) or len(sent) > _AT_MOST:
        raise BadAttribute("no attributes, or too many")
    kind: Any = type(report)
    own = _names_of(kind)
    for name, value in sent.items():
        if name in own or name in vars(report) or not _is_free(name):
            raise BadAttribute(f"an attribute that is not a plug-in's: {clean_name(name, 100)}")
        try:
            found = unpack(value)
        except (ValueError, TypeError) as error:
            raise BadAttribute(f"an attribute that is no plain value: {name}") from error
        setattr(report, name, _checked(name, found))


def left_of(sent: object) -> list[str]:
    """On the host: in words, what could not cross."""
    if not isinstance(sent, list):
        return []
    pairs = [pair for pair in sent[:_AT_MOST] if isinstance(pair, list) and len(pair) == 2]
    return [f"{clean_name(str(name), 100)} ({clean_name(str(kind), 100)})" for name, kind in pairs]


def _is_free(name: str) -> bool:
    """Whether a plug-in may give it a meaning."""
    plain = name.isidentifier() and len(name) <= 200 and not name.startswith("__")
    return plain and not name.startswith(_OURS) and name not in _OF_XDIST


@functools.cache
def _names_of(kind: type) -> frozenset[str]:
    """All that reports of a class have by themselves."""
    made = pytest.TestReport("a.py::b", ("a.py", 0, "b"), {}, "passed", None, "call")
    declared = {name for each in kind.__mro__ for name in inspect.get_annotations(each)}
    return frozenset({*vars(made), *dir(kind), *declared, "nodeid", "wasxfail"})


def _checked(name: str, found: Any) -> Any:
    """Where it is known who makes JSON of it when the run has ended, it must be possible. Raises BadAttribute."""
    try:
        if name in _OF_HTML:
            found = _extras(found)
            json.dumps(found)
        elif name == _OF_JSON_REPORT:
            json.dumps(found, default=str)
    except (TypeError, ValueError) as error:
        raise BadAttribute(f"an attribute that is no JSON: {name}") from error
    return found


def _extras(found: Any) -> Any:
    """pytest-html's page shows these as they are, and some as files of its own. None of them is to be a file elsewhere, or a
    script that changes what the page says of other tests."""
    return [_extra(each) if isinstance(each, dict) else each for each in found] if isinstance(found, list) else found


def _extra(found: dict[Any, Any]) -> dict[Any, Any]:
    made = dict(found)
    for name, form in (("extension", _EXTENSION), ("mime_type", _MIME_TYPE)):
        value = made.get(name)
        if value is not None and not (isinstance(value, str) and form.fullmatch(value)):
            made[name] = None
    if isinstance(made.get("name"), str):
        made["name"] = html.escape(clean_name(made["name"]))
    kind, content = made.get("format_type"), made.get("content")
    if not isinstance(content, str):
        return made
    if kind == "html":
        made["content"] = f'<iframe sandbox srcdoc="{html.escape(content)}" style="border: 0; width: 100%"></iframe>'
    elif kind in ("url", "image", "video"):
        content = clean_name(content.strip(), len(content))
        made["content"] = html.escape(content) if _LINK.match(content) else "#"
    return made
