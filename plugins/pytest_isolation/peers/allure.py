"""allure-pytest: a test's result, its steps and attachments, and the fixtures that it has used, are written by the host.

Inside, what allure would write is kept instead, and crosses. On the host it is written under names of the host's own making,
or of the form that allure gives to attachments.
"""

from __future__ import annotations

import base64
import re
import sys
import uuid
from typing import Any

import pytest

from isolation.plain import json
from pytest_isolation.host.crash_reports import CrashRepr
from pytest_isolation.peers.carrier import Carrier, Refused
from pytest_isolation.wire.sanitize import clean_all

_ENTRIES_AT_MOST = 10_000  # of one test
_BYTES_AT_MOST = 32 << 20
_KINDS = {"result": "TestResult", "container": "TestResultContainer", "globals": "Globals"}
_ATTACHMENT = re.compile(r"[0-9a-f-]{36}-attachment(\.[A-Za-z0-9]{1,16})?")


class _Recorder:
    """In the place of allure's own logger, whose hooks these are."""

    def __init__(self) -> None:
        self.entries: list[list[Any]] = []
        self._room = _BYTES_AT_MOST
        self.cut = False

    def _add(self, *entry: Any, size: int) -> None:
        self._room -= size
        if self._room < 0 or len(self.entries) >= _ENTRIES_AT_MOST:
            self.cut = True
        else:
            self.entries.append(list(entry))

    def _add_item(self, kind: str, item: Any) -> None:
        data = _loaded("attr").asdict(item, filter=lambda _, value: bool(value) or value is False)
        text = json.dumps(data, default=str)
        self._add(kind, text, size=len(text))

    def report_result(self, result: Any) -> None:
        self._add_item("result", result)

    def report_container(self, container: Any) -> None:
        self._add_item("container", container)

    def report_globals(self, globals_item: Any) -> None:
        self._add_item("globals", globals_item)

    def report_attached_data(self, body: Any, file_name: str) -> None:
        content = body.encode() if isinstance(body, str) else bytes(body)
        self._add("attachment", file_name, base64.b64encode(content).decode(), size=len(content))

    def report_attached_file(self, source: Any, file_name: str) -> None:
        with open(source, "rb") as file:
            self.report_attached_data(file.read(_BYTES_AT_MOST + 1), file_name)


class AllureCarrier(Carrier):
    """Of one session; `listener` is allure's plug-in, `logger` what writes its files."""

    name = "allure"

    def __init__(self, listener: Any, logger: Any) -> None:
        self._listener = listener
        self._logger = logger
        self._recorder = _Recorder()
        self._children: dict[str, dict[str, None]] = {}  # of fixtures that templates have set up: the tests that used them
        self._cut: list[str] = []

    @classmethod
    def of(cls, config: pytest.Config) -> AllureCarrier | None:
        listener = config.pluginmanager.getplugin("allure_listener")
        plugins = getattr(sys.modules.get("allure_commons"), "plugin_manager", None)
        if listener is None or plugins is None or not hasattr(listener, "allure_logger"):
            return None
        loggers = [plugin for plugin in plugins.get_plugins() if type(plugin).__name__ == "AllureFileLogger"]
        return cls(listener, loggers[0]) if loggers else None

    # Inside.

    def begin(self) -> None:
        allure_commons = _loaded("allure_commons")
        plugins = allure_commons.plugin_manager
        for old in (self._logger, self._recorder):
            if plugins.is_registered(old):
                plugins.unregister(old)
        self._recorder = _Recorder()
        for name in dir(_Recorder):
            if name.startswith("report_"):
                allure_commons.hookimpl(getattr(_Recorder, name))
        plugins.register(self._recorder)

    def collect(self, item: pytest.Item, phase: str) -> object | None:
        recorder = self._recorder
        entries, recorder.entries = recorder.entries, []
        items = self._listener.allure_logger._items.thread_context.values()
        children = [[group.uuid, list(group.children)] for group in items if getattr(group, "children", None)]
        if not entries and not children:
            return None
        return {"entries": entries, "children": children, "cut": recorder.cut}

    # On the host.

    def check(self, item: pytest.Item, sent: Any) -> dict[str, Any]:
        if len(sent["entries"]) > _ENTRIES_AT_MOST or len(sent["children"]) > _ENTRIES_AT_MOST:
            raise Refused("allure: too much")
        found = [self._check_entry(item, *entry) for entry in sent["entries"]]
        children = [(_uuid(group), [_uuid(child) for child in tests]) for group, tests in sent["children"]]
        return {"entries": found, "children": children, "cut": sent["cut"] is True}

    def _check_entry(self, item: pytest.Item, kind: str, *content: str) -> tuple[str, Any]:
        if kind == "attachment":
            name, text = content
            if not _ATTACHMENT.fullmatch(name):
                raise Refused("allure: an attachment of no such name")
            return name, base64.b64decode(text, validate=True)
        data = clean_all(json.loads(*content))
        if not isinstance(data, dict) or kind not in _KINDS:
            raise Refused("allure: no such thing")
        _uuid(data.get("uuid", str(uuid.uuid4())))
        if kind == "result":
            self._check_result(item, data)
        return str(getattr(_loaded("allure_commons.model2"), _KINDS[kind]).file_pattern.format(prefix=uuid.uuid4())), data

    @staticmethod
    def _check_result(item: pytest.Item, data: dict[str, Any]) -> None:
        """A test speaks for itself only: allure takes a result for another one's retry, and hides that, by these."""
        utils, model2 = _loaded("allure_pytest.utils"), _loaded("allure_commons.model2")
        known: str = utils.allure_full_name(item)
        if data.get("fullName", known) != known:
            raise Refused("allure: a result of another test")
        if "testCaseId" in data:
            data["testCaseId"] = _loaded("allure_commons.utils").md5(known)
        if "historyId" in data:
            values = getattr(getattr(item, "callspec", None), "params", {})
            parameters = [
                model2.Parameter(name=str(each["name"]), value=each["value"], excluded=each.get("excluded"))
                for each in data.get("parameters", ())
            ]
            data["historyId"] = utils.get_history_id(known, parameters, original_values=values)

    def apply(self, item: pytest.Item, value: dict[str, Any]) -> None:
        for group, tests in value["children"]:
            self._children.setdefault(group, {}).update(dict.fromkeys(tests))
        for name, content in value["entries"]:
            if isinstance(content, dict):
                tests = self._children.pop(content.get("uuid", ""), {})
                if tests and name.endswith("-container.json"):
                    content["children"] = [*dict.fromkeys([*content.get("children", ()), *tests])]
                if name.endswith("-result.json"):
                    self._forget_own()
            body = json.dumps(content, ensure_ascii=False) if isinstance(content, dict) else content
            self._logger.report_attached_data(body, name)
        if value["cut"]:
            self._cut.append(item.nodeid)

    def told(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """A test that has died leaves no result: it has the one that allure has begun on the host."""
        own = self._own()
        if own is None or not isinstance(report.longrepr, CrashRepr) or not report.failed:
            return
        for _ in self._listener.pytest_runtest_setup(item):
            pass  # what allure does behind it is to describe the test
        for _ in self._listener.pytest_runtest_teardown(item):
            pass
        model2 = _loaded("allure_commons.model2")
        own.status = model2.Status.BROKEN
        own.statusDetails = model2.StatusDetails(message=report.longrepr.reprcrash.message, trace=report.longreprtext)

    def _own(self) -> Any:
        return self._listener.allure_logger.get_last_item(_loaded("allure_commons.model2").TestResult)

    def _forget_own(self) -> None:
        """The result that allure has begun on the host."""
        own = self._own()
        if own is None:
            return
        self._listener.allure_logger.drop_test(own.uuid)
        cache: dict[Any, Any] = self._listener._cache._items
        for key in [key for key, known in cache.items() if known == own.uuid]:
            del cache[key]

    def notes(self) -> list[str]:
        return [f"of what {nodeid} has attached, the first {_BYTES_AT_MOST >> 20}M were kept" for nodeid in self._cut]


def _loaded(module: str) -> Any:
    """One of allure's, which this process has imported."""
    return sys.modules[module]


def _uuid(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f-]{36}", value):
        raise Refused("allure: no identifier")
    return value
