"""Reports on the wire: encoded in the sandbox, checked on the host. JSON only; the guest is not believed.

What the host accepts from a test: its outcome (a test can always spoil its own), text, numbers. What it does not:
another test's node id, attributes that pytest gives a meaning to, control sequences, objects of any kind.
"""

from __future__ import annotations

import builtins
import linecache
import math
import warnings
from typing import Any

import pytest

from isolation.plain import json
from pytest_isolation.peers import rerunfailures
from pytest_isolation.peers.origin import is_pytests_own
from pytest_isolation.wire import attributes
from pytest_isolation.wire.sanitize import clean, clean_all, clean_name, clean_output

_OUTCOMES = ("passed", "failed", "skipped")
_PHASES = ("setup", "call", "teardown")
_VALUES_AT_MOST = 200_000
_SECTIONS_AT_MOST = 1000
_PROPERTIES_AT_MOST = 10_000
_WARNING_NAMES = frozenset(
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Warning)
)


class BadReport(ValueError):
    """The guest sent something that is not a report of this test."""


def encode(config: pytest.Config, report: pytest.TestReport) -> bytes:
    """In the sandbox. What is not JSON crosses as its repr()."""
    before = report.outcome
    after = None
    if report.when == "call":
        # Plug-ins change a report's outcome here (pytest's own subtests do), which the terminal reporter would cause.
        config.hook.pytest_report_teststatus(report=report, config=config)
        if report.outcome != before:
            after = {"outcome": report.outcome, "longrepr": str(report.longrepr)}
            report.outcome = before
            report.longrepr = None
    data = config.hook.pytest_report_to_serializable(config=config, report=report)
    data["isolation_attributes"], data["isolation_left"] = attributes.take(report, data)
    data["isolation_after"] = after
    data["isolation_drawn"] = hasattr(report.longrepr, "toterminal") and isinstance(data["longrepr"], str)
    context = data.get("_subtest.context")
    if isinstance(context, dict):
        context["kwargs"] = {name: _as_shown(report, name, value) for name, value in context["kwargs"].items()}
    try:
        return json.dumps(data, default=_repr).encode()
    except (TypeError, ValueError, RecursionError):
        data["longrepr"] = None if data.get("longrepr") is None else report.longreprtext
        data["user_properties"] = [(str(name), _repr(value)) for name, value in report.user_properties]
        data["keywords"] = {str(name): 1 for name in data.get("keywords", ())}
        return json.dumps(data, default=_repr, skipkeys=True).encode()


def _as_shown(report: pytest.TestReport, name: str, value: object) -> str:
    """A subtest's parameter as text. pytest 9.2 has made its values text already; before, they are what the test gave."""
    made = isinstance(value, str) and value != "" and f"{name}={value}" in (report.head_line or "")
    return str(value) if made else _repr(value)


class _Shown(str):
    """Text that is its own repr(): pytest takes the repr() of parameters, and these are one."""

    def __repr__(self) -> str:
        return str(self)


class Drawn:
    """What a test's failure looks like where it has a form of its own, as a doctest's: pytest puts text alone into its short
    summary, and this not."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text

    def toterminal(self, tw: Any) -> None:
        tw.line(self._text)


def _repr(value: object) -> str:
    try:
        return repr(value)
    except BaseException as error:  # a test's __repr__ may raise anything
        return f"<{type(error).__name__} in __repr__ of {type(value).__name__}>"


def decode(config: pytest.Config, item: pytest.Item, payload: object) -> pytest.TestReport:
    """On the host: a report of `item`, rebuilt from what its sandbox sent. Raises BadReport."""
    try:
        if not isinstance(payload, bytes):
            raise BadReport("a report without content")
        if json.values(payload) > _VALUES_AT_MOST:
            raise BadReport(f"more than {_VALUES_AT_MOST} values in one report")
        data = json.loads(payload)
        checked = _check(item, data)
        report = config.hook.pytest_report_from_serializable(config=config, data=checked)
        if not isinstance(report, pytest.TestReport):
            raise BadReport("not a test report")
        attributes.put(report, data.get("isolation_attributes") or {})
        left = attributes.left_of(data.get("isolation_left"))
        if left:
            report.__dict__["_isolation_left"] = left
        if isinstance(data.get("isolation_after"), dict):
            report.__dict__["_isolation_after"] = _check_after(data["isolation_after"])
        if data.get("isolation_drawn") is True and isinstance(report.longrepr, str):
            report.longrepr = Drawn(report.longrepr)  # type: ignore[assignment]
        _try_to_show(report)
    except BadReport:
        raise
    except attributes.BadAttribute as error:
        raise BadReport(str(error)) from error
    except Exception as error:
        raise BadReport(f"malformed: {type(error).__name__}: {clean_name(str(error), 200)}") from error
    return report


def _check(item: pytest.Item, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise BadReport("not an object")
    outcome: Any = data.get("outcome")
    when: Any = data.get("when")
    known = rerunfailures.is_used(item.config) if outcome == "rerun" else outcome in _OUTCOMES or _is_known(item, outcome)
    if when not in _PHASES or not known:
        raise BadReport("no such outcome or phase")
    times = {name: _number(data.get(name)) for name in ("start", "stop")}
    checked: dict[str, Any] = {
        "$report_type": "TestReport",
        "nodeid": _nodeid(item, data.get("nodeid")),
        "location": item.location,
        "keywords": {clean_name(name): 1 for name in _expect(data.get("keywords"), dict)},
        "outcome": outcome,
        "longrepr": _longrepr(item, data.get("longrepr"), outcome, expected="wasxfail" in data),
        "when": when,
        "sections": [_pair(section) for section in _expect(data.get("sections"), list)[:_SECTIONS_AT_MOST]],
        "user_properties": [
            (clean_name(str(name)), clean_all(value))
            for name, value in _expect(data.get("user_properties"), list)[:_PROPERTIES_AT_MOST]
        ],
        "duration": _number(data.get("duration"), max(0.0, times["stop"] - times["start"])),
        **times,
    }
    if "wasxfail" in data:
        checked["wasxfail"] = clean(_expect(data["wasxfail"], str))
    if data.get("_report_type") == "SubTestReport":
        context = _expect(data.get("_subtest.context"), dict)
        message = context.get("msg")
        checked["_report_type"] = "SubTestReport"
        checked["_subtest.context"] = {
            "msg": None if message is None else clean(str(message)),
            "kwargs": {
                clean_name(name): _Shown(clean(_expect(value, str)))
                for name, value in _expect(context["kwargs"], dict).items()
            },
        }
    return checked


def _check_after(after: dict[str, Any]) -> tuple[str, str]:
    if after.get("outcome") != "failed":
        raise BadReport("a change of outcome that is not to a failure")
    return "failed", clean(_expect(after.get("longrepr"), str))


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise BadReport(f"{type(value).__name__} where {kind.__name__} belongs")
    return value


def _pair(value: Any) -> tuple[str, str]:
    title, content = _expect(value, list)
    return clean_name(_expect(title, str)), clean_output(_expect(content, str))


def _number(value: Any, instead: float = 0.0) -> float:
    """A plug-in may have set it, to infinity, say: what it was instead. Raises BadReport for what is none at all."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadReport("a time that is no number")
    return value if math.isfinite(value) else instead


def _nodeid(item: pytest.Item, sent: object) -> str:
    """The test's own, whatever the report says; but a plug-in may write it in another way, to have ids of another script
    readable. An item may say of itself what its reports do not: pytest keeps apart the two."""
    own = str(getattr(item, "id", item.nodeid))
    if sent in (own, item.nodeid):
        return str(sent)
    if isinstance(sent, str) and sent == _unescaped(own) and sent not in _others(item.session):
        return clean_name(sent)
    return own


def _unescaped(nodeid: str) -> str:
    try:
        return nodeid.encode("utf-8").decode("unicode_escape")
    except ValueError:
        return nodeid


_nodeids = pytest.StashKey[tuple[int, frozenset[str]]]()


def _others(session: pytest.Session) -> frozenset[str]:
    """All that is the name of a test."""
    items = getattr(session, "items", ())
    known = session.stash.get(_nodeids, None)
    if known is None or known[0] != len(items):
        known = session.stash[_nodeids] = len(items), frozenset(each.nodeid for each in items)
    return known[1]


def _is_known(item: pytest.Item, outcome: object) -> bool:
    """Whether a plug-in on the host, or the project's, says how to show an outcome that is none of pytest's own."""
    if not isinstance(outcome, str) or not outcome.isidentifier() or len(outcome) > 50:
        return False
    config = item.config
    own = [plugin for plugin in config.pluginmanager.get_plugins() if is_pytests_own(plugin)]
    shown = pytest.TestReport(item.nodeid, item.location, {}, outcome, None, "call")  # type: ignore[arg-type]
    caller = config.pluginmanager.subset_hook_caller("pytest_report_teststatus", own)
    return bool(caller(report=shown, config=config))


def _longrepr(item: pytest.Item, value: Any, outcome: str, *, expected: bool) -> Any:
    """None, text, a skip's (path, line, reason), or a dictionary that pytest itself rebuilds; tuples again.

    It must fit the outcome, on which pytest's reporters rely. Where a plug-in has changed that alone, it is made to.
    """
    if outcome == "skipped" and not expected and not isinstance(value, list):
        path, line, _domain = item.location
        return path, (line or 0) + 1, "" if value is None else _text_of(value)
    if outcome in ("failed", "rerun") and value is None:
        return f"the outcome was set to {outcome!r}, without a reason"
    if value is None or isinstance(value, str):
        return None if value is None else clean(value)
    if isinstance(value, list):
        path, line, reason = value
        return clean_name(_expect(path, str)), _expect(line, int), clean(_expect(reason, str))
    value = clean_all(_expect(value, dict))
    crash, trace = value.get("reprcrash"), value.get("reprtraceback")
    _expect(trace, dict)
    if crash is not None:
        _expect(crash.get("message"), str)
    return value


def _text_of(value: Any) -> str:
    """Of a failure, in short."""
    crash = value.get("reprcrash") if isinstance(value, dict) else None
    message = crash.get("message") if isinstance(crash, dict) else value
    return clean(message, 1000) if isinstance(message, str) else ""


def _try_to_show(report: pytest.TestReport) -> None:
    """Whatever would fail when it is printed must fail here, and fail this one test only."""
    _ = report.longreprtext, report.caplog, report.capstdout, report.capstderr


def encode_warning(message: warnings.WarningMessage, when: str, nodeid: str, location: Any) -> dict[str, Any]:
    """In the sandbox: text and place of a warning, its source line included."""
    return {
        "message": str(message.message),
        "category": message.category.__name__,
        "filename": message.filename,
        "lineno": message.lineno,
        "line": message.line if message.line is not None else linecache.getline(message.filename, message.lineno).strip(),
        "when": when,
        "nodeid": nodeid,
        "location": list(location) if location else None,
    }


def decode_warning(item: pytest.Item, data: Any) -> dict[str, Any]:
    """On the host: keyword arguments for `pytest_warning_recorded`. Raises BadReport.

    The category is looked up among Python's own, else a new class that only has its name: a module or class that
    the guest names is never imported (pytest-xdist does, and so runs what the guest likes). A source line is
    always given, else printing would read any file that the guest names.
    """
    try:
        return _decode_warning(item, data)
    except BadReport:
        raise
    except Exception as error:
        raise BadReport(f"a malformed warning: {type(error).__name__}") from error


def _decode_warning(item: pytest.Item, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict) or data.get("when") not in ("config", "collect", "runtest"):
        raise BadReport("not a warning")
    name = str(data.get("category"))
    if not name.isidentifier() or len(name) > 200:
        raise BadReport("a warning without a category")
    category = getattr(builtins, name) if name in _WARNING_NAMES else type(name, (Warning,), {})
    text = clean(_expect(data.get("message"), str), 1 << 20)
    message = warnings.WarningMessage(
        message=_warning(category, text),
        category=category,
        filename=clean_name(_expect(data.get("filename"), str)),
        lineno=_expect(data.get("lineno"), int),
        line=clean(_expect(data.get("line"), str), 4096),
    )
    place = data.get("location")
    if place is not None:
        path, line, function = _expect(place, list)
        place = (clean_name(_expect(path, str)), _expect(line, int), clean_name(_expect(function, str)))
    return {"warning_message": message, "when": data["when"], "nodeid": item.nodeid, "location": place}


def _warning(category: type[Warning], text: str) -> Warning:
    try:
        return category(text)
    except TypeError:  # UnicodeWarning and its like take other arguments
        return Warning(text)
