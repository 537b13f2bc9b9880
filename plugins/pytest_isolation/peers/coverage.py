"""coverage.py, with or without pytest-cov: the lines (or arcs) that ran in a fork count where the run is measured.

Inside, the tracer goes on as the fork has inherited it; only where it puts its data is another place, from which they go to
the host. For that, and for whether a file is measured at all, there are only names that coverage.py calls private. Where one
is missing, the run says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from isolation.plain import os
from pytest_isolation.peers.carrier import Carrier, Refused, text_of

_FILES_AT_MOST = 20_000
_NUMBERS_PER_LINE = 20  # of a file, in one context
_LINE_AT_MOST = 1_000_000
_CONTEXTS_AT_MOST = 1000  # of one test

Numbers = dict[tuple[str, str], set[Any]]  # by context and file: lines, or arcs as pairs


class _Recorder:
    """Inside: in the place of a CoverageData, as far as a collector uses one; it has no database."""

    def __init__(self) -> None:
        self.found: Numbers = {}
        self.tracers: dict[str, str] = {}
        self._context = ""

    def set_context(self, context: str | None) -> str:
        before, self._context = self._context, context or ""
        return before

    def add_lines(self, line_data: Mapping[str, Iterable[int]]) -> None:
        for name, lines in line_data.items():
            self.found.setdefault((self._context, name), set()).update(lines)

    def add_arcs(self, arc_data: Mapping[str, Iterable[tuple[int, int]]]) -> None:
        for name, arcs in arc_data.items():
            self.found.setdefault((self._context, name), set()).update(arcs)

    def add_file_tracers(self, file_tracers: Mapping[str, str]) -> None:
        self.tracers.update(file_tracers)

    def touch_files(self, filenames: Collection[str], plugin_name: str | None = None) -> None:
        """Files that did not run are the host's to name."""

    def write(self) -> None:
        """Coverage's own way to end a process (`patch = _exit`); here another has that task."""

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        """For a test that looks at its own coverage: there is none yet."""
        from coverage import CoverageData

        return getattr(CoverageData(no_disk=True), name)


class CoverageCarrier(Carrier):
    """Of the Coverage that measures this process."""

    name = "coverage"

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._measured: Any = None
        self._recorder = _Recorder()
        self._files_before: frozenset[str] = frozenset()
        self._seen: dict[tuple[str, str], bool] = {}  # by file and tracer: whether it is to be measured
        self._most: dict[str, int] = {}  # by file: how many numbers it can have
        self._contexts: dict[str, set[str]] = {}  # by test
        self._found: Numbers = {}
        self._tracers: dict[str, str] = {}
        self._unknown = ""

    @classmethod
    def of(cls, config: pytest.Config) -> CoverageCarrier | None:
        return None if _current() is None else cls(config)

    # Inside.

    def begin(self) -> None:
        measured = _current()
        if measured is None or measured is self._measured:
            return  # the fork has inherited an empty one
        self._measured = measured
        try:
            collector = measured._collector
            self._recorder = _Recorder()
            collector.covdata = measured._data = self._recorder
            collector.flush_data()  # until now: the host knows that, too
        except AttributeError:
            self._measured = None
            return
        self._recorder.found.clear()
        self._files_before = frozenset(self._files_of_children())

    def collect(self, item: pytest.Item, phase: str) -> object | None:
        if self._measured is None:
            return None
        self._measured._collector.flush_data()
        self._add_children()
        recorder = self._recorder
        if not recorder.found:
            return None
        context = ""
        if phase and self._config.pluginmanager.hasplugin("_cov_contexts"):
            context = f"{item.nodeid}|{phase}"  # which pytest-cov names at a test's hooks, and a template runs none
        contexts: dict[str, dict[str, list[Any]]] = {}
        for (named, file), numbers in recorder.found.items():
            contexts.setdefault(named or context, {})[file] = list(numbers)
        sent = {"branch": self._branch(self._measured), "contexts": contexts, "tracers": recorder.tracers}
        recorder.found = {}
        recorder.tracers = {}
        return sent

    def _files_of_children(self) -> list[str]:
        """Data files beside the run's own, which processes that are measured by themselves write."""
        config = self._measured.config
        if not (config.parallel or getattr(config, "patch", ()) or "multiprocessing" in config.concurrency):
            return []
        directory, name = os.path.split(os.path.abspath(config.data_file))
        try:
            return [os.path.join(directory, each) for each in os.listdir(directory) if each.startswith(name + ".")]
        except OSError:
            return []

    def _add_children(self) -> None:
        """What a test's processes have measured: their files would go with the sandbox. Read here, where they come from."""
        new = [path for path in self._files_of_children() if path not in self._files_before]
        if not new:
            return
        from coverage import CoverageData
        from coverage.exceptions import CoverageException

        self._files_before |= set(new)
        for path in new:
            try:
                data = CoverageData(path)
                data.read()
                for context in data.measured_contexts():
                    data.set_query_context(context)
                    for file in data.measured_files():
                        numbers = data.arcs(file) if self._branch(self._measured) else data.lines(file)
                        if numbers:
                            self._recorder.found.setdefault((context, file), set()).update(numbers)
                data.close()
            except (CoverageException, OSError):
                continue  # one that was broken off, which coverage.py itself ignores when it combines them

    # On the host.

    def check(self, item: pytest.Item, sent: Any) -> tuple[Numbers, dict[str, str]]:
        measured = _current()
        if measured is None:
            return {}, {}
        if sent["branch"] is not self._branch(measured):
            raise Refused("coverage: it measures something else")
        tracers = {str(file): str(tracer) for file, tracer in sent["tracers"].items()}
        check = _arcs if sent["branch"] else _lines
        found: Numbers = {}
        for context, files in sent["contexts"].items():
            if len(files) > _FILES_AT_MOST:
                raise Refused("coverage: too many files")
            named = text_of(context, 1000)
            if named:
                self._contexts.setdefault(item.nodeid, set()).add(named)
                if len(self._contexts[item.nodeid]) > _CONTEXTS_AT_MOST:
                    raise Refused("coverage: too many contexts")
            for file, numbers in files.items():
                checked = check(numbers)
                if self._is_measured(measured, file, tracers.get(file, "")):
                    self._check_number(named, file, checked)
                    found.setdefault((named, file), set()).update(checked)
        return found, {file: tracer for file, tracer in tracers.items() if any(file == name for _, name in found)}

    def _check_number(self, context: str, file: str, numbers: set[Any]) -> None:
        """A file has no more lines, or arcs, than its length allows for: what is believed is kept to the end of the run."""
        if file not in self._most:
            from coverage.files import relative_directory

            with open(os.path.join(relative_directory(), file), "rb") as source:
                self._most[file] = _NUMBERS_PER_LINE * (source.read().count(b"\n") + 10)
        if len(numbers) + len(self._found.get((context, file), ())) > self._most[file]:
            raise Refused(f"coverage: more lines than {os.path.basename(file)} has")

    def apply(self, item: pytest.Item, value: tuple[Numbers, dict[str, str]]) -> None:
        """Kept until the end: every addition to the database is a transaction."""
        found, tracers = value
        for place, numbers in found.items():
            self._found.setdefault(place, set()).update(numbers)
        self._tracers.update(tracers)

    def finish(self) -> None:
        measured = _current()
        if measured is None or not self._found:
            return
        from coverage.exceptions import CoverageException

        found, self._found = self._found, {}
        contexts: dict[str, dict[str, set[Any]]] = {}
        for (context, file), numbers in found.items():
            contexts.setdefault(context, {})[file] = numbers
        try:
            collector = measured._collector
            collector.flush_data()  # in the context that it belongs to
            data = collector.covdata
            add: Callable[[Any], None] = data.add_arcs if self._branch(measured) else data.add_lines
            before = getattr(data, "_current_context", None)
            for context, files in contexts.items():
                whole = [part for part in (collector.static_context, context) if part]
                is_whole = context.startswith(f"{collector.static_context}|") or context == collector.static_context
                data.set_context(context if is_whole else "|".join(whole) or None)
                add(files)
            data.set_context(before)
            data.add_file_tracers(self._tracers)
        except (AttributeError, CoverageException) as error:
            self._unknown = f"{type(error).__name__}: {error}"

    def notes(self) -> list[str]:
        if not self._unknown:
            return []
        return [f"lines that ran in sandboxes could not be added ({self._unknown}); the figures are too low"]

    @staticmethod
    def _branch(measured: Any) -> bool:
        return bool(measured.get_option("run:branch"))

    def _is_measured(self, measured: Any, file: str, tracer: str) -> bool:
        if (file, tracer) not in self._seen:
            try:
                self._seen[file, tracer] = self._look(measured, file, tracer)
            except AttributeError as error:
                self._unknown, self._seen[file, tracer] = str(error), False
        return self._seen[file, tracer]

    def _look(self, measured: Any, file: str, tracer: str) -> bool:
        """Whether plain pytest would measure that file: it is here, is the project's, and coverage.py says so."""
        from coverage.files import relative_directory

        path = os.path.normpath(os.path.join(relative_directory(), file))
        if "\0" in path or not os.path.isfile(path) or measured._file_mapper(path) != file:
            return False
        roots = {os.path.realpath(root) for root in (str(self._config.rootpath), os.getcwd(), *sys.path)}
        if not any(os.path.realpath(path).startswith(root.rstrip("/") + "/") for root in roots):
            return False
        if tracer:
            known = {each._coverage_plugin_name for each in measured._plugins.file_tracers}
            return tracer in known and bool(measured._check_include_omit_etc(path, None))
        for name in _module_names(path):  # `source` may name packages, and matches these with a module's name
            frame = SimpleNamespace(f_globals={"__name__": name, "__file__": path})
            if measured._inorout.should_trace(path, frame).trace:
                return True
        return False


def _current() -> Any:
    """The Coverage that measures this process, if one does."""
    if "coverage" not in sys.modules:
        return None
    from coverage import Coverage

    return Coverage.current()


def _module_names(path: str) -> Iterator[str]:
    """What a module may be called that is loaded from there."""
    parts = os.path.splitext(path)[0].strip("/").split("/")
    if len(parts) > 1 and parts[-1] == "__init__":
        parts.pop()
    for start in range(len(parts) - 1, -1, -1):
        yield ".".join(parts[start:])


def _lines(numbers: list[Any]) -> set[int]:
    if not all(type(line) is int and 0 <= line <= _LINE_AT_MOST for line in numbers):
        raise Refused("coverage: no line number")
    return set(numbers)


def _arcs(numbers: list[Any]) -> set[tuple[int, int]]:
    found = set()
    for first, then in numbers:
        if type(first) is not int or type(then) is not int or max(abs(first), abs(then)) > _LINE_AT_MOST:
            raise Refused("coverage: no arc")
        found.add((first, then))
    return found
