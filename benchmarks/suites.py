"""Run the test suites of real projects twice, plain and with `--isolation`, and compare every single outcome.

    python benchmarks/suites.py                     all suites but the large ones
    python benchmarks/suites.py flask click         these suites
    python benchmarks/suites.py --list              what there is, what is deselected, and why
    python benchmarks/suites.py --plain-only        only check that the plain runs are green
    python benchmarks/suites.py --sealed            the second runs by `isolation pytest`

Each suite is one project at a fixed version: its sdist is fetched with pip and unpacked, and a venv gets the
project, what its tests need, pytest, and this checkout (editable). Every run has a fresh copy of the sdist;
the commands differ in `--flags` alone. The exit status is 1 if an outcome differs that the suite does not
explain, if a run hangs or breaks off, or if a plain run is not green.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

from _common import (
    CHECKOUT,
    PreparationError,
    clean_environment,
    default_cache,
    make_venv,
    median,
    run_to_log,
    table,
    timed_run,
)

DEFAULT_PYTEST = "9.2.0"
TIME_OF_DAY = r"\d\d:\d\d:\d\d"
RANDOM_DATA = r"\bdata=\[.*\]"


@dataclass(frozen=True)
class Suite:
    """One project's tests.

    `deselected` holds only what fails or hangs in a plain run as well; a test that fails in a sandbox alone
    belongs in `explained`, where it is still run and still shown. Both map a test to the reason.
    """

    name: str
    version: str
    tests: str
    needs: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    pytest: str | None = None  # the newest pytest that these tests work with, where that is not the newest of all
    large: bool = False  # run only when named
    varying: str = ""  # a pattern of what changes in the names of tests and subtests from run to run
    deselected: Mapping[str, str] = field(default_factory=dict)
    explained: Mapping[str, str] = field(default_factory=dict)


SUITES = (
    Suite("itsdangerous", "2.2.0", "tests", needs=("freezegun",)),
    Suite("markupsafe", "3.0.4", "tests"),
    Suite("iniconfig", "2.3.1", "testing"),
    Suite("h11", "0.16.0", "h11/tests"),
    Suite("pluggy", "1.7.0", "testing", needs=("pytest-benchmark",)),
    Suite("toolz", "1.2.0", "toolz"),
    Suite("tenacity", "9.2.1", "tests", needs=("tornado", "trio")),
    Suite("jinja2", "3.1.6", "tests", needs=("trio",)),
    Suite("tomlkit", "0.15.2", "tests", needs=("pyyaml",)),
    Suite("boltons", "26.2.0", "tests"),
    Suite("marshmallow", "4.4.0", "tests", needs=("simplejson",), varying=TIME_OF_DAY),
    Suite("mistune", "3.4.0", "tests"),
    Suite("simplejson", "4.3.0", "simplejson/tests"),
    Suite("parso", "0.8.7", "test"),
    Suite("click", "8.5.1", "tests"),
    Suite(
        "attrs",
        "26.1.0",
        "tests",
        needs=("cloudpickle", "hypothesis", "pympler"),
        arguments=("--hypothesis-seed=0",),
        deselected={
            "tests/test_converters.py::TestPipe::test_wrapped_annotation": "wants an inspect.signature that"
            " early releases of Python 3.11 and 3.12 lack; fails plain with 3.11.7 and 3.12.1",
        },
    ),
    Suite(
        "werkzeug",
        "3.1.9",
        "tests",
        needs=("cffi", "cryptography", "ephemeral-port-reserve", "pytest-timeout", "watchdog<7"),
    ),
    Suite(
        "flask",
        "3.1.3",
        "tests",
        needs=("asgiref", "greenlet", "python-dotenv", "werkzeug==3.1.6"),
        pytest="9.0.3",
    ),
    Suite("idna", "3.20", "tests", needs=("hypothesis",), arguments=("--hypothesis-seed=0",)),
    Suite("more-itertools", "11.2.1", "tests", varying=RANDOM_DATA),
    Suite(
        "packaging",
        "26.3",
        "tests",
        needs=("hypothesis", "pip", "pretend", "tomli_w"),
        arguments=("--hypothesis-seed=0",),
        large=True,
    ),
)


# What a run said


@dataclass
class Outcome:
    """How one test (or one file that could not be collected) ended."""

    verdict: str
    subtests: list[tuple[str, str]] = field(default_factory=list)  # description, outcome
    reason: str = ""  # why it was skipped, or the end of what it failed with

    def __str__(self) -> str:
        if not self.subtests:
            return self.verdict
        counts = Counter(outcome for _, outcome in self.subtests)
        return f"{self.verdict} (subtests: {_counted(counts)})"

    def same(self, other: Outcome) -> bool:
        return self.verdict == other.verdict and self.subtests == other.subtests


NOT_REPORTED = Outcome("not reported")


@dataclass
class Result:
    """One run of one suite."""

    seconds: float
    status: int
    timed_out: bool
    outcomes: dict[str, Outcome]
    unfinished: list[str]  # tests that were started and did not finish
    warnings: int
    log: str

    @property
    def broke_off(self) -> str:
        """Why outcomes are missing, or nothing: pytest ends with 0 or 1 when it has run everything."""
        if self.timed_out:
            return f"timeout after {self.seconds:.0f} s"
        if self.status not in (0, 1):
            return f"signal {-self.status}" if self.status < 0 else f"exit status {self.status}"
        return ""

    @property
    def summary(self) -> str:
        counts = Counter(outcome.verdict for outcome in self.outcomes.values())
        subtests = sum(len(outcome.subtests) for outcome in self.outcomes.values())
        text = _counted(counts) + (f" (+{subtests} subtests)" if subtests else "")
        return f"{self.broke_off}; {text}" if self.broke_off else text

    @property
    def green(self) -> bool:
        return self.status == 0 and not self.timed_out


def _counted(counts: Counter[str]) -> str:
    """For example "3 failed, 297 passed"."""
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts)) or "nothing"


def read_outcomes(path: Path, varying: str = "") -> tuple[dict[str, Outcome], list[str], int]:
    """From a file of `_outcomes.py`: each test's outcome, the tests left unfinished, how many warnings."""
    reports: dict[str, list[dict[str, Any]]] = {}
    outcomes: dict[str, Outcome] = {}
    started: Counter[str] = Counter()
    warnings = 0
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        for name in ("nodeid", "subtest"):
            if varying and name in event:
                event[name] = re.sub(varying, "…", event[name])
        match event["event"]:
            case "report":
                reports.setdefault(event["nodeid"], []).append(event)
            case "collect":
                outcomes[event["nodeid"]] = Outcome(f"collection {event['outcome']}", reason=event["text"])
            case "start":
                started[event["nodeid"]] += 1
            case "finish":
                started[event["nodeid"]] -= 1
            case "warning":
                warnings += 1
    outcomes.update((nodeid, _outcome(events)) for nodeid, events in reports.items())
    return outcomes, [nodeid for nodeid, count in started.items() if count > 0], warnings


def _outcome(events: Sequence[Mapping[str, Any]]) -> Outcome:
    """One outcome from all the reports of a test, as pytest counts them.

    Reports that are missing or come twice are part of the verdict: losing or doubling them is just what a
    runner in several processes can do without a test failing.
    """
    verdicts: list[str] = []
    subtests: list[tuple[str, str]] = []
    reasons: list[str] = []
    phases: Counter[str] = Counter()
    for event in events:
        if event.get("text") or event.get("reason"):
            reasons.append(event.get("text") or event["reason"])
        if "subtest" in event:
            subtests.append((event["subtest"], _word(event)))
            continue
        phases[event["when"]] += 1
        if event["when"] == "call" or event["outcome"] != "passed":
            verdicts.append(_word(event))
    if phases["setup"] != 1 or phases["teardown"] != 1 or phases["call"] > 1:
        counted = ", ".join(f"{phases[when]} {when}" for when in ("setup", "call", "teardown"))
        verdicts.append(f"[reports: {counted}]")
    return Outcome("+".join(verdicts), subtests, "\n".join(reasons))


def _word(event: Mapping[str, Any]) -> str:
    """pytest's word for one report."""
    if "wasxfail" in event and event["outcome"] != "failed":
        return "xfailed" if event["outcome"] == "skipped" else "xpassed"
    if event["outcome"] == "failed" and event["when"] != "call":
        return "error"
    return str(event["outcome"])


# Preparing and running


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    python: str
    pytest: str
    cache: Path
    flags: tuple[str, ...]
    plain_only: bool
    repeat: int
    timeout: float | None
    sealed: bool = False


def fetch(suite: Suite, options: Options) -> Path:
    """The unpacked sdist. Only this project is fetched as source; what builds it may come as wheels."""
    name = f"{suite.name}-{suite.version}"
    source = options.cache / "sources" / name
    if source.exists():
        return source
    download = options.cache / "sdists" / name
    download.mkdir(parents=True, exist_ok=True)
    command = [options.python, "-m", "pip", "--no-input", "download", "--no-deps", "--no-binary", suite.name]
    log = options.cache / "sdists" / f"{name}.log"
    run_to_log([*command, "--dest", download, f"{suite.name}=={suite.version}"], log, f"fetching the sdist of {name}")
    unpacked = options.cache / "sources" / f"{name}.partly"
    if unpacked.exists():
        rmtree(unpacked)
    (archive,) = download.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(unpacked, filter="data")
        else:  # Python before 3.11.4; the archive is PyPI's
            tar.extractall(unpacked)
    (top,) = unpacked.iterdir()
    top.rename(source)
    unpacked.rmdir()
    return source


def prepare(suite: Suite, options: Options) -> tuple[Path, Path]:
    """The unpacked sdist and the interpreter to test it with.

    A venv for each suite: in one for all, the pytest plug-ins that one needs would be loaded for the others.
    """
    source = fetch(suite, options)
    pytest = _pytest_for(suite, options.pytest)
    python = make_venv(
        options.cache / "venvs" / f"{suite.name}-pytest{pytest}",
        [f"pytest=={pytest}", f"{suite.name}=={suite.version}", *suite.needs],
        python=options.python,
        checkout=None if options.plain_only else CHECKOUT,
    )
    return source, python


def _pytest_for(suite: Suite, asked: str) -> str:
    if suite.pytest is None:
        return asked
    return min(suite.pytest, asked, key=lambda version: [int(part) for part in version.split(".")])


def run_suite(
    suite: Suite,
    source: Path,
    python: Path,
    options: Options,
    flags: Sequence[str],
    kind: str,
    timeout: float,
    *,
    sealed: bool = False,
) -> Result:
    """One run in a fresh copy of the sdist, always at the same path: tests may show it in their names."""
    copy = options.cache / "work" / suite.name
    if copy.exists():
        rmtree(copy)
    copytree(source, copy, symlinks=True)
    logs = options.cache / "logs"
    logs.mkdir(exist_ok=True)
    recorded = logs / f"{suite.name}-{kind}.jsonl"
    recorded.unlink(missing_ok=True)
    log = logs / f"{suite.name}-{kind}.log"
    here = str(Path(__file__).resolve().parent)
    start = ["-m", "pytest"]
    if sealed:
        start = ["-I", "-m", "isolation", "pytest", f"--mount={here}:{here}", f"--env=PYTHONPATH={here}"]
        start += ["--env=OUTCOMES_FILE=outcomes.jsonl", "--export=outcomes.jsonl", "--"]
    command = [
        str(python),
        *start,
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "-p",
        "_outcomes",
    ]
    command += [
        *suite.arguments,
        *(f"--deselect={nodeid}" for nodeid in suite.deselected),
        *flags,
        suite.tests,
    ]
    environment = clean_environment(python, PYTHONPATH=here, OUTCOMES_FILE=str(recorded))
    run = timed_run(command, cwd=copy, environment=environment, log=log, timeout=timeout)
    if sealed and (copy / "outcomes.jsonl").exists():
        (copy / "outcomes.jsonl").rename(recorded)
    outcomes, unfinished, warnings = read_outcomes(recorded, suite.varying)
    return Result(run.seconds, run.status, run.timed_out, outcomes, unfinished, warnings, str(log))


# Comparing


@dataclass(frozen=True)
class Difference:
    """A test that ended in another way than in the first plain run."""

    nodeid: str
    was: Outcome
    now: Outcome
    run: str  # the first run in which it did
    explained: str  # why it may; empty if the suite does not say


@dataclass
class Comparison:
    """A suite's plain runs beside its isolated ones; no isolated ones with --plain-only."""

    suite: Suite
    plain: list[Result] = field(default_factory=list)
    isolated: list[Result] = field(default_factory=list)

    def runs(self) -> list[tuple[str, Result]]:
        return [
            (f"{kind} run {number}", result)
            for kind, results in (("plain", self.plain), ("isolated", self.isolated))
            for number, result in enumerate(results, 1)
        ]

    def differences(self) -> list[Difference]:
        first = self.plain[0].outcomes
        found: dict[str, Difference] = {}
        for run, result in self.runs()[1:]:
            for nodeid in [*first, *(nodeid for nodeid in result.outcomes if nodeid not in first)]:
                was, now = first.get(nodeid, NOT_REPORTED), result.outcomes.get(nodeid, NOT_REPORTED)
                if not was.same(now):
                    explained = self.suite.explained.get(nodeid, "")
                    found.setdefault(nodeid, Difference(nodeid, was, now, run, explained))
        return list(found.values())

    def other_status(self) -> list[str]:
        """Runs that ended with another status although every test ended alike."""
        status = self.plain[0].status
        return [] if self.differences() else [run for run, result in self.runs() if result.status != status]

    def plain_seconds(self) -> float:
        return median(result.seconds for result in self.plain)

    def isolated_seconds(self) -> float | None:
        return median(result.seconds for result in self.isolated) if self.isolated else None

    def added_milliseconds(self) -> float | None:
        """For each test, of the whole run's wall time: what starting the plug-in costs is in it."""
        isolated, tests = self.isolated_seconds(), len(self.plain[0].outcomes)
        return (isolated - self.plain_seconds()) * 1000 / tests if isolated is not None and tests else None

    def good(self) -> bool:
        return (
            all(result.green for result in self.plain)
            and not any(result.broke_off for result in self.isolated)
            and not self.other_status()
            and all(difference.explained for difference in self.differences())
        )


def compare(suite: Suite, options: Options) -> Comparison:
    """Prepare a suite and run it as often as asked, plain and isolated in turn."""
    source, python = prepare(suite, options)
    comparison = Comparison(suite)
    # A venv of an earlier run may have the plug-in, in whatever state the checkout is now.
    plain_flags = ["-p", "no:isolation"] if options.plain_only else []
    for number in range(1, options.repeat + 1):
        timeout = options.timeout or 300.0
        plain = run_suite(suite, source, python, options, plain_flags, f"plain-{number}", timeout)
        comparison.plain.append(plain)
        if options.plain_only or plain.broke_off:  # nothing to compare with
            continue
        timeout = options.timeout or 300.0 + 0.05 * len(plain.outcomes)
        comparison.isolated.append(
            run_suite(suite, source, python, options, options.flags, f"isolated-{number}", timeout, sealed=options.sealed)
        )
    return comparison


# Saying it

HEADERS = ("suite", "tests", "plain result", "differ", "plain s", "isolated s", "ms/test added")


def row(comparison: Comparison) -> tuple[object, ...]:
    suite, plain, differences = comparison.suite, comparison.plain[0], comparison.differences()
    explained = sum(bool(difference.explained) for difference in differences)
    differ = str(len(differences) - explained) + (f" (+{explained} explained)" if explained else "")
    isolated, added = comparison.isolated_seconds(), comparison.added_milliseconds()
    broke_off = next((result.broke_off for result in comparison.isolated if result.broke_off), "")
    return (
        f"{suite.name} {suite.version}",
        len(plain.outcomes),
        plain.summary,
        "-" if len(comparison.runs()) == 1 else differ,
        f"{comparison.plain_seconds():.1f}",
        "-" if isolated is None else broke_off or f"{isolated:.1f}",
        "-" if added is None or broke_off else f"{added:.1f}",
    )


def notes(comparison: Comparison) -> list[str]:
    """What stands below the table for a suite; nothing if all went as it should."""
    lines: list[str] = []
    for run, result in comparison.runs():
        if result.broke_off:
            lines.append(f"  {run}: {result.broke_off}; see {result.log}")
            lines += [f"    | {line}" for line in _tail(Path(result.log))]
            lines += _some([f"    unfinished: {nodeid}" for nodeid in result.unfinished])
        elif run.startswith("plain") and not result.green:
            lines.append(f"  {run} is not green; see {result.log}")
            fine = ("passed", "skipped", "xfailed", "xpassed")
            bad = {nodeid: str(o) for nodeid, o in result.outcomes.items() if str(o) not in fine}
            lines += _some([f"    {outcome}: {nodeid}" for nodeid, outcome in bad.items()])
    differences = comparison.differences()
    if any(result.broke_off for result in comparison.isolated):
        unreported = [difference for difference in differences if difference.now == NOT_REPORTED]
        differences = [difference for difference in differences if difference.now != NOT_REPORTED]
        lines.append(f"  {len(unreported)} tests: not reported")
    lines += _some([line for difference in differences for line in _described(difference)], 60)
    lines += [f"  {run}: another exit status, same outcomes" for run in comparison.other_status()]
    if comparison.isolated:
        lines += _compared_closer(comparison.plain[0], comparison.isolated[0])
        unneeded = comparison.suite.explained.keys() - {d.nodeid for d in comparison.differences()}
        lines += [f"  {nodeid}: explained, yet it does not differ" for nodeid in sorted(unneeded)]
    return [f"{comparison.suite.name}:", *lines] if lines else []


def _some(lines: list[str], most: int = 30) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"  … and {len(lines) - most} more lines"]


def _described(difference: Difference) -> list[str]:
    was, now = difference.was, difference.now
    lines = [f"  {difference.nodeid}: {was} → {now} ({difference.run})"]
    if difference.explained:
        lines.append(f"      explained: {difference.explained}")
    elif now.reason:
        lines.append(f"      {_telling_line(now.reason)}")
    if was.verdict == now.verdict:
        lines += [f"      subtest {line}" for line in _subtest_differences(was, now)[:5]]
    return lines


def _compared_closer(plain: Result, isolated: Result) -> list[str]:
    """What differs although the outcomes are the same: worth a look, and no failure."""
    lines = [f"  warnings: {plain.warnings} → {isolated.warnings}"] if plain.warnings != isolated.warnings else []
    for nodeid, was in plain.outcomes.items():
        now = isolated.outcomes.get(nodeid, NOT_REPORTED)
        if was.same(now) and was.verdict == "skipped" and was.reason != now.reason:
            lines.append(f"  {nodeid}: skipped for another reason: {was.reason!r} → {now.reason!r}")
    return _some(lines)


def _telling_line(text: str) -> str:
    """The line of a traceback that says most: pytest marks an error's own lines with "E"."""
    lines = [line.strip(" |") for line in text.splitlines() if any(map(str.isalnum, line))]
    return next((line for line in lines if line.startswith("E ")), lines[-1] if lines else "")[:200]


def _tail(log: Path, lines: int = 5) -> list[str]:
    return [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line][-lines:]


def _subtest_differences(was: Outcome, now: Outcome) -> list[str]:
    before, after = Counter(was.subtests), Counter(now.subtests)
    lines = [f"missing: {description} {outcome}" for description, outcome in before - after]
    lines += [f"new: {description} {outcome}" for description, outcome in after - before]
    return lines or ["reports come in another order"]


def as_json(comparison: Comparison) -> dict[str, object]:
    return {
        "suite": comparison.suite.name,
        "version": comparison.suite.version,
        "tests": len(comparison.plain[0].outcomes),
        "good": comparison.good(),
        "differences": [asdict(difference) for difference in comparison.differences()],
        "plain_seconds": comparison.plain_seconds(),
        "isolated_seconds": comparison.isolated_seconds(),
        "added_milliseconds_per_test": comparison.added_milliseconds(),
        "runs": [
            {
                "run": run,
                "summary": result.summary,
                "seconds": result.seconds,
                "status": result.status,
                "timed_out": result.timed_out,
                "unfinished": result.unfinished,
                "warnings": result.warnings,
            }
            for run, result in comparison.runs()
        ],
    }


def list_suites() -> str:
    rows = [
        (
            suite.name,
            suite.version,
            suite.tests,
            suite.pytest or "",
            "yes" if suite.large else "",
            " ".join(suite.needs),
        )
        for suite in SUITES
    ]
    lines = [table(("suite", "version", "tests", "pytest", "large", "needs"), rows, left=range(6))]
    for suite in SUITES:
        lines += [f"{suite.name}: deselects {nodeid}: {reason}" for nodeid, reason in suite.deselected.items()]
        lines += [f"{suite.name}: may differ {nodeid}: {reason}" for nodeid, reason in suite.explained.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    known = {suite.name: suite for suite in SUITES}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="suites to run (default: all but the large ones)")
    parser.add_argument("--list", action="store_true", help="show the suites and end")
    parser.add_argument("--python", default=sys.executable, help="interpreter, with pip, to make the venvs from")
    parser.add_argument("--pytest", default=DEFAULT_PYTEST, metavar="VERSION", help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=default_cache("suites"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--flags",
        help="what the second run adds, written --flags=… (default: --isolation, but with --sealed nothing)",
    )
    parser.add_argument("--sealed", action="store_true", help="start the second run by `isolation pytest`")
    parser.add_argument("--plain-only", action="store_true", help="without the second run, and without the checkout")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each kind; times are medians")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for each run (default: 300 and more)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here as well")
    asked = parser.parse_args(arguments)
    if asked.list:
        print(list_suites())
        return 0
    if unknown := [name for name in asked.names if name not in known]:
        parser.error(f"no suite is named {', '.join(unknown)}; there are {', '.join(known)}")
    options = Options(
        python=asked.python,
        pytest=asked.pytest,
        cache=asked.cache.resolve(),
        flags=tuple(shlex.split(asked.flags or "")) if asked.flags or asked.sealed else ("--isolation",),
        plain_only=asked.plain_only,
        repeat=max(1, asked.repeat),
        timeout=asked.timeout,
        sealed=asked.sealed,
    )
    for part in ("sdists", "sources", "venvs", "logs", "work"):
        (options.cache / part).mkdir(parents=True, exist_ok=True)

    comparisons: list[Comparison] = []
    unprepared: list[str] = []
    for suite in [known[name] for name in asked.names] or [suite for suite in SUITES if not suite.large]:
        print(f"{suite.name} {suite.version} …", end=" ", file=sys.stderr, flush=True)
        try:
            comparison = compare(suite, options)
        except PreparationError as error:
            unprepared.append(f"{suite.name}: {error}")
            print("not run", file=sys.stderr)
            continue
        comparisons.append(comparison)
        print("ok" if comparison.good() else "NOT OK", comparison.plain[0].summary, file=sys.stderr, flush=True)

    print(table(HEADERS, [row(comparison) for comparison in comparisons], left=(0, 2)))
    for comparison in comparisons:
        print(*notes(comparison), sep="\n", end="\n" if notes(comparison) else "")
    print(*unprepared, sep="\n", end="\n" if unprepared else "")
    if asked.json:
        report = {"flags": options.flags, "suites": [as_json(comparison) for comparison in comparisons]}
        asked.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if not unprepared and all(comparison.good() for comparison in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
