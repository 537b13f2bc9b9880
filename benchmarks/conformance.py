"""pytest's own tests, of fixtures, of how tests are run, and of what is shown: as they are, and with each pytest that they
run inside isolated.

    python benchmarks/conformance.py [FILE …]       all of FILES, or these
    python benchmarks/conformance.py -k EXPRESSION   only tests that match

Most of these tests run pytest on a small suite, and look at what it shows and reports. Here they do so twice: plain, and
with `--isolation=namespace` added to every inner run. A test that then ends in another way is a difference: a fault of ours,
or one that `_explained.py` tells the reason of. The exit status is 0 if
no other difference is there.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from _common import CHECKOUT, clean_environment, default_cache, make_venv, table, timed_run
from _explained import EXPLAINED
from suites import NOT_REPORTED, Options, Outcome, Suite, fetch, read_outcomes

VERSION = "9.2.0"
NEEDS = ["attrs", "hypothesis", "xmlschema", "setuptools", "pexpect"]
FILES = (
    "python/collect.py python/fixtures.py python/integration.py python/metafunc.py "
    "logging/test_fixture.py logging/test_reporting.py acceptance_test.py "
    "test_cacheprovider.py test_capture.py test_collection.py test_conftest.py test_debugging.py "
    "test_doctest.py test_faulthandler.py test_junitxml.py test_legacypath.py test_mark.py test_monkeypatch.py "
    "test_recwarn.py test_reports.py test_runner.py test_runner_xunit.py test_session.py test_setuponly.py "
    "test_setupplan.py test_skipping.py test_stepwise.py test_subtests.py test_terminal.py test_threadexception.py "
    "test_tmpdir.py test_unittest.py test_unraisableexception.py test_warnings.py"
).split()  # fmt: skip
# What is printed past pytest's capture is the point of these: a terminal that is an object of the process does not show it.
SHOWN = ("test_setuponly.py", "test_setupplan.py", "logging/test_reporting.py")  # but for one test, which fails so


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("files", nargs="*", default=FILES, metavar="FILE", help="below pytest's testing/")
    options = parser.parse_args()
    source, python = prepare()
    plain: dict[str, Outcome] = {}
    isolated: dict[str, Outcome] = {}
    for file in options.files:
        for found, arguments in ((plain, ["-p", "no:isolation"]), (isolated, ["-p", "_inner"])):
            name = default_cache("conformance") / f"{file.replace('/', '-')}-{'plain' if found is plain else 'isolated'}"
            words = [*arguments, *(["--runpytest=subprocess"] if file in SHOWN else []), f"testing/{file}"]
            found |= outcomes(name, python, source, words, options.expression, {"COLUMNS": "80"}, (0, 1, 5))
    return compare(plain, isolated, EXPLAINED, verbose=options.verbose)


def command_line(description: str | None) -> argparse.ArgumentParser:
    """What every such run understands."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", dest="expression", default="", help="only tests that match")
    parser.add_argument("--verbose", action="store_true", help="show how each unexplained difference has failed")
    return parser


def outcomes(
    name: Path,
    python: Path,
    source: Path,
    words: Sequence[str],
    expression: str,
    environ: Mapping[str, str],
    fine: Sequence[int] = (0, 1),
) -> dict[str, Outcome]:
    """How the tests in `source` end, and written down beside `name`. Raises SystemExit if pytest's status is not `fine`."""
    name.parent.mkdir(parents=True, exist_ok=True)
    recorded, log = name.with_name(f"{name.name}.jsonl"), name.with_name(f"{name.name}.log")
    recorded.unlink(missing_ok=True)
    command: list[str | Path] = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "_outcomes", "-k", expression]
    command += words
    here = str(Path(__file__).resolve().parent)
    environment = clean_environment(python, PYTHONPATH=here, OUTCOMES_FILE=str(recorded), **environ)
    run = timed_run(command, cwd=source, log=log, timeout=3600, environment=environment)
    print(f"{name.name}: {run.seconds:.0f} s, exit status {run.status}", file=sys.stderr, flush=True)
    if run.status not in fine:
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        raise SystemExit(1)
    return read_outcomes(recorded)[0]


def prepare() -> tuple[Path, Path]:
    """The unpacked sdist, and an interpreter that has that pytest and this checkout."""
    cache = default_cache("suites")
    options = Options(sys.executable, VERSION, cache, flags=(), plain_only=False, repeat=1, timeout=None)
    source = fetch(Suite("pytest", VERSION, "testing"), options)
    return source, make_venv(cache / "venvs" / "pytest-conformance", [f"pytest=={VERSION}", *NEEDS], checkout=CHECKOUT)


def compare(plain: dict[str, Outcome], isolated: dict[str, Outcome], explained: dict[str, str], *, verbose: bool) -> int:
    """Print it all, with the reasons, by pattern, for some; the exit status."""
    tests: Counter[str] = Counter()
    different: Counter[str] = Counter()
    lines: dict[str, list[str]] = {}
    for nodeid, was in plain.items():
        file = nodeid.partition("::")[0]
        tests[file] += 1
        now = isolated.get(nodeid, NOT_REPORTED)
        if was.same(now):
            continue
        different[file] += 1
        reason = explanation(nodeid, explained)
        lines.setdefault(reason, []).append(f"  {nodeid}: {was} → {now}")
        if verbose and not reason:
            lines[reason] += [f"    | {line}" for line in now.reason.splitlines()[-60:]]
    rows = [(file, tests[file], tests[file] - different[file], different[file]) for file in tests]
    rows.append(("all", sum(tests.values()), sum(tests.values()) - sum(different.values()), sum(different.values())))
    print(table(("file", "tests", "same", "different"), rows))
    for reason in sorted(lines, key=lambda reason: (not reason, reason)):
        print(f"\n{reason or 'NOT EXPLAINED'}:", *lines[reason], sep="\n")
    unneeded = [pattern for pattern in explained if not any(
        fnmatch.fnmatchcase(nodeid, pattern) and not was.same(isolated.get(nodeid, NOT_REPORTED))
        for nodeid, was in plain.items()
    )]  # fmt: skip
    ran = {nodeid.partition("::")[0] for nodeid in plain}
    for pattern in unneeded:
        if pattern.partition("::")[0] in ran:
            print(f"\nexplained, yet it does not differ: {pattern}")
    return 1 if "" in lines else 0


def explanation(nodeid: str, explained: dict[str, str]) -> str:
    """Why a test may end in another way; "" for no reason."""
    return next((reason for pattern, reason in explained.items() if fnmatch.fnmatchcase(nodeid, pattern)), "")


if __name__ == "__main__":
    sys.exit(main())
