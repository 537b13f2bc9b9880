"""The page of `--isolation-report`: what stands in it, and what it does in a real browser."""

from __future__ import annotations

import base64
import html.parser
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pytest_isolation.report import page
from pytest_isolation.report.record import RunRecord, TestRecord

from isolation import plain
from isolation.result import Change

pytestmark = pytest.mark.once

HOSTILE = (
    "</script><script>document.hacked = 1</script> <!-- <script> --> <img src=x onerror='document.hacked = 1'>"
    "<link rel=stylesheet href='http://attacker.invalid/'> &lt;b&gt; \u2028\u2029 \ud800 lone \x00\x07 $run ${policy}"
    " \x1b[31mred\x1b[0m \x1b[38;2;1;2;3murl(http://attacker.invalid/)\x1b[m \x1b]8;;http://attacker.invalid/\x07 \u202eright to left"
)
OUTCOMES = ("failed", "error", "skipped", "xfailed", "xpassed", "rerun")
BEGUN = 1_760_000_000.0

FAILURE = """\
    def test_total(cart):
        cart.add("pear", 3)
>       assert cart.total == 4.2
E       AssertionError: assert 3.6 == 4.2
E        +  where 3.6 = <Cart pear=3>.total

shop/tests/test_cart.py:31: AssertionError"""


CRASH = """the test's process was killed by signal 11 (SIGSEGV)

Current thread 0x00007f (most recent call first):
  File "<frozen runpy>", line 198 in _run_module_as_main"""


def sample(count: int = 300, jobs: int = 4) -> RunRecord:
    """A run as it might have been: mostly passed, in lanes without gaps."""
    tests: list[TestRecord] = []
    free = [BEGUN] * jobs
    modules = (
        "shop/tests/test_cart.py",
        "shop/tests/test_orders.py",
        "shop/tests/api/test_http.py::TestLogin",
        "test_cli.py",
    )
    for number in range(1, count + 1):
        worker = free.index(min(free))
        wall = 0.004 + (number * 7919 % 101) ** 2 / 60_000
        test = TestRecord(
            nodeid=f"{modules[number * len(modules) // (count + 1)]}::test_case[{number}-€]",
            outcome=OUTCOMES[number // 16 % len(OUTCOMES)] if number % 16 == 0 else "passed",
            sandbox=number,
            worker=worker,
            backend="namespace",
            start=free[worker],
            wall=wall,
            cpu=None if number % 50 == 0 else wall * 0.8,
            memory=None if number % 50 == 0 else (20 << 20) + number * 104_729 % (90 << 20),
            verdict="exited with status 0",
        )
        if test.outcome == "failed":
            test = replace(
                test, message=FAILURE, sections=(("Captured stdout call", "adding \x1b[32mpear\x1b[0m\n1 of 3\n"),)
            )
        elif test.outcome == "error":
            test = replace(test, verdict="killed by signal 11 (SIGSEGV)", message=CRASH)
        elif test.outcome in ("skipped", "xfailed"):
            test = replace(test, message="Skipped: needs a database")
        if number % 9 == 0:
            changes = (Change("/project/out.csv", "added", "file", 1234), Change("/tmp/cache", "deleted", "directory"))
            test = replace(
                test, changes=changes, processes=("python -m http.server 8000",), refused=("192.0.2.7:443 (TCP)",)
            )
        tests.append(test)
        free[worker] += wall + 0.001
    loud = min(15, count - 1)
    tests[loud] = replace(
        tests[loud], message=HOSTILE, sections=((HOSTILE, HOSTILE),), changes=(Change(HOSTILE, "added"),), refused=(HOSTILE,)
    )
    return RunRecord(
        created=max(free) + 0.2,
        wall=max(free) - BEGUN,
        pytest="9.0.1",
        python="3.13.1",
        platform="Linux 6.12.0 x86_64",
        rootdir="/home/jo/shop",
        args=("--isolation", "-k", "not slow", "--isolation-report=report.html"),
        jobs=jobs,
        backend="namespace",
        exitstatus=1,
        tests=tuple(tests),
    )


class _Elements(html.parser.HTMLParser):
    """What a browser would make of the page, as far as it matters here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def test_what_tests_have_said_stays_data() -> None:
    run = sample()
    text = page.render(run)
    elements, harmless = _Elements(text), _Elements(page.render(replace(run, tests=())))
    assert elements.tags == harmless.tags
    assert elements.attributes == harmless.attributes
    data = json.loads(elements.scripts[0])
    assert data["tests"][15]["message"] == HOSTILE
    assert not any(character in elements.scripts[0] for character in "<>&\u2028\u2029")
    text.encode()  # no lone surrogate is in the way


def test_only_its_own_script_may_run() -> None:
    elements = _Elements(page.render(sample()))
    policy = next(value for name, value in elements.attributes if name == "content" and value and "default-src" in value)
    assert page._digest(elements.scripts[1]) in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_json_holds_everything() -> None:
    run = sample()
    data = json.loads(json.dumps(run.to_json()))
    assert data == run.to_json()
    assert data["format"] == 1
    assert data["args"] == list(run.args)
    assert [TestRecord(**{**test, "sections": tuple((section["name"], section["text"]) for section in test["sections"]),
                          "changes": tuple(Change(**change) for change in test["changes"]),
                          "processes": tuple(test["processes"]), "refused": tuple(test["refused"])})
            for test in data["tests"]] == list(run.tests)  # fmt: skip


def test_summary() -> None:
    run = sample(64)
    own = replace(run.tests[0], sandbox=0, cpu=None, memory=None)
    summary = replace(run, tests=(*run.tests, own)).summary()
    assert summary["outcomes"] == {"passed": 61, "error": 1, "skipped": 1, "xfailed": 1, "xpassed": 1}
    assert summary["sandboxes"] == 64
    assert summary["cpu"] == pytest.approx(sum(test.cpu or 0 for test in run.tests))
    assert summary["memory"] == max(test.memory or 0 for test in run.tests)
    assert replace(run, tests=(own,)).summary() == {"outcomes": {"passed": 1}, "sandboxes": 0, "cpu": None, "memory": None}


def test_written_as_its_name_says(tmp_path: Path) -> None:
    run = sample(20)
    page.write(run, tmp_path / "new" / "report.html")
    page.write(run, str(tmp_path / "new" / "report.json"))
    assert (tmp_path / "new" / "report.html").read_text("utf-8") == page.render(run)
    assert json.loads((tmp_path / "new" / "report.json").read_text("ascii")) == run.to_json()
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "new" / "report.html").stat().st_mode & 0o777 == 0o666 & ~umask
    for wrong in ("report.txt", "report", ".html"):
        with pytest.raises(ValueError, match=r"ends in \.html or \.json, not '"):
            page.write(run, tmp_path / "new" / wrong)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json"]


def test_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "report.json"
    report.write_text("the one before")

    def fail(*_arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(plain.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        page.write(sample(3), report)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert report.read_text() == "the one before"


def test_a_flood_is_cut_in_the_page_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_TEXT_AT_MOST", 100)
    monkeypatch.setattr(page, "_TEXTS_AT_MOST", 300)
    monkeypatch.setattr(page, "_LINES_AT_MOST", 2)
    run = sample(3)
    flood = replace(run.tests[0], sections=(("Captured stdout call", "a" * 1000 + "z" * 1000),))
    failed = replace(flood, outcome="failed", message="x" * 100, processes=("sleep 1",) * 5)
    run = replace(run, tests=(flood, failed, flood))
    assert len(run.to_json()["tests"][0]["sections"][0]["text"]) == 2000
    shown = json.loads(_Elements(page.render(run)).scripts[0])["tests"]
    assert shown[1]["message"] == "x" * 100
    assert shown[1]["sections"][0]["text"].startswith("a" * 50 + "\n[… 1900 characters are not in this page; ")
    assert shown[1]["sections"][0]["text"].endswith("…]\n" + "z" * 50)
    assert shown[1]["left_out"] == {"processes": 3}
    assert len(shown[1]["processes"]) == 2
    assert "[… 2000 characters" in shown[2]["sections"][0]["text"]


class Browser:
    """Chromium, driven over its DevTools protocol: JSON messages, each ended by a NUL, over a pair of pipes."""

    def __init__(self, program: str, home: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Chromium reads descriptor 3 and writes 4; the shell puts them there, after taking both out of the way.
        script = 'exec 8<&"$1" 9>&"$2" 3<&8 4>&9 8<&- 9>&-; shift 2; exec "$@"'
        options = ("--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe "
                   "--disable-background-networking --disable-component-update --disable-extensions --hide-scrollbars "
                   f"--window-size=1280,900 --user-data-dir={home}/profile about:blank").split()  # fmt: skip
        # In a sandbox of its own Chromium would need namespaces, which not every user may have; it opens our page only.
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(theirs_in), str(theirs_out), program, *options],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": f"{home}/config", "XDG_CACHE_HOME": f"{home}/cache"},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return dict(answer["result"])
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + 300
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            assert data, "Chromium has ended" if ready else "Chromium does not answer"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def open(self, path: Path) -> None:
        """Another page, from its beginning."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for("location.protocol === 'file:' && document.readyState === 'complete'")

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str) -> None:
        deadline = time.monotonic() + 300
        while not self.ask(script):
            assert time.monotonic() < deadline, f"never: {script}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of what is really there."""
        self.ask(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = self.ask(
            f"(box => [box.x + box.width / 2, box.y + box.height / 2])(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def key(self, key: str, text: str = "") -> None:
        code = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **extra)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def emulate(self, scheme: str = "light", medium: str = "") -> None:
        self.call("Emulation.setEmulatedMedia", media=medium, features=[{"name": "prefers-color-scheme", "value": scheme}])

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[Any]:
        """Errors and warnings since the page was opened, and all that it asked the network for."""
        self.ask("new Promise(done => setTimeout(done, 50))")
        found: list[Any] = []
        for event in self.events:
            parameters = event.get("params", {})
            match event.get("method"):
                case "Network.requestWillBeSent":
                    url = parameters["request"]["url"]
                    if not url.startswith(("file:", "data:")) or parameters["type"] not in ("Document", "Other"):
                        found.append(url)
                case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded":
                    found.append(parameters)
        return found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium to open the page in: apt-get install --no-install-recommends chromium")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.emulate()
    chromium.resize(1280, 900)
    return chromium


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    page.write(sample(), path)
    return path


STATUS = "document.getElementById('status').textContent"
ROWS = "[...document.querySelectorAll('tr.test')]"


def column(browser: Browser, key: str) -> list[str]:
    """One column of all rows, which scrolling to the end makes."""
    browser.ask("dispatchEvent(new Event('beforeprint'))")
    return list(browser.ask(f"[...document.querySelectorAll('td.{key}')].map(cell => cell.textContent)"))


def chip(value: str) -> str:
    return f".chip[value={value}]"


def test_it_opens_without_a_complaint(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert browser.ask("document.title") == "shop: isolation report"
    assert browser.ask(STATUS) == "300 tests"
    figures = browser.ask("[...document.querySelectorAll('.figure')].map(figure => figure.textContent)")
    assert figures[:7] == ["3errors", "3failed", "3xpassed", "3rerun", "3xfailed", "3skipped", "282passed"]
    assert figures[-2:] == ["300sandboxes", "4at a time"]
    assert browser.ask("document.getElementById('command').textContent").startswith("pytest --isolation -k 'not slow' ")
    assert len(column(browser, "wall")) == 300
    assert browser.complaints() == []


def test_complaints_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    spoilt = tmp_path / "report.html"
    spoilt.write_text(
        page.render(sample(3)).replace(
            "</body>", "<script>document.hacked = 1</script><img src='http://127.0.0.1:9/x'></body>"
        )
    )
    browser.open(spoilt)
    said = str(browser.complaints())
    assert said.count("Content Security Policy") >= 2
    assert browser.ask("document.hacked") is None


@pytest.mark.parametrize("key", ["wall", "cpu", "memory", "changes", "start", "sandbox", "worker"])
def test_numbers_sort_as_numbers(browser: Browser, report: Path, key: str) -> None:
    browser.open(report)
    for direction in ("descending", "ascending"):
        browser.click(f"th.{key} button")
        assert browser.ask(f"document.querySelector('th.{key}').getAttribute('aria-sort')") == direction
        cells = column(browser, key)
        known = [float(cell or 0) for cell in cells if cell != "–"]
        assert known == sorted(known, reverse=direction == "descending")
        assert len(set(known)) > 1
        assert cells[len(known) :] == ["–"] * (len(cells) - len(known)), "what nobody measured comes last"


def test_names_sort_as_people_count(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert browser.ask("document.querySelector('th[aria-sort=ascending]').dataset.key") == "outcome"
    assert column(browser, "outcome")[:7] == ["error"] * 3 + ["failed"] * 3 + ["xpassed"]
    browser.click("th.test button")
    numbers = [int(name.partition("test_case[")[2].partition("-")[0]) for name in column(browser, "test")]
    assert numbers.index(9) < numbers.index(10) < numbers.index(70)


def test_search_and_filters_narrow_it(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.key("/", "/")
    browser.type("TEST_http sigsegv")  # of the name and of the message, in any case
    assert browser.ask(STATUS) == "1 of 300 tests"
    assert browser.ask(f"{ROWS}.length") == 1
    assert browser.ask("document.querySelectorAll('.bar:not(.is-out)').length") == 1
    browser.key("Escape")
    assert browser.ask(STATUS) == "300 tests"
    browser.click(chip("failed"))
    assert set(column(browser, "outcome")) == {"failed"}
    browser.click(chip("error"))
    assert browser.ask(STATUS) == "6 of 300 tests"
    assert browser.ask(f"document.querySelector('{chip('error')}').getAttribute('aria-pressed')") == "true"
    browser.click(chip("failed"))
    browser.click(chip("error"))
    browser.click(chip("processes"))
    assert browser.ask(STATUS) == "33 of 300 tests"
    browser.click("#search")
    browser.type("there is no such test")
    assert browser.ask("document.getElementById('nothing').checkVisibility()")
    browser.click("#reset")
    assert browser.ask(STATUS) == "300 tests"
    assert browser.complaints() == []


def test_the_reason_in_a_line(browser: Browser, report: Path) -> None:
    browser.open(report)
    reasons = browser.ask(
        "[...document.querySelectorAll('tr.test:has(.reason)')].map(r => [r.className, r.querySelector('.reason').textContent].join('|'))"
    )
    said = {line.partition("|")[2] for line in reasons}
    assert "the test's process was killed by signal 11 (SIGSEGV)" in said
    assert "AssertionError: assert 3.6 == 4.2" in said
    assert not any("frozen" in line for line in said)


def test_a_row_opens(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.click("#search")
    browser.type("test_case[144-")
    browser.click("tr.test td.wall")
    said = browser.ask("document.querySelector('tr.details').innerText")
    for part in (
        "test_case[144-€]",
        "exited with status 0",
        "/project/out.csv",
        "1.21 KiB",
        "/tmp/cache",
        "http.server 8000",
        "192.0.2.7:443",
    ):
        assert part in said
    assert browser.ask("document.querySelector('.name').getAttribute('aria-expanded')") == "true"
    assert browser.ask("location.hash") == "#test-143"
    assert browser.ask("document.querySelectorAll('.bar.is-open').length") == 1
    browser.click("tr.test .name")
    assert browser.ask("document.querySelector('tr.details')") is None
    assert browser.ask("location.hash") == ""


def test_by_keyboard(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.key("/", "/")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp", "Enter"):
        browser.key(key, "\r" if key == "Enter" else "")
    assert browser.ask(f"{ROWS}[1].nextSibling.className") == "details is-error"


def test_colours_of_output(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.ask(f"{ROWS}.find(row => row.textContent.includes('test_case[96-')).click()")
    explained = "document.querySelector('tr.details .explained')"
    assert browser.ask(f"{explained}.textContent") == "E       AssertionError: assert 3.6 == 4.2"
    painted = "[...document.querySelectorAll('tr.details pre span')].find(span => span.textContent === 'pear')"
    assert browser.ask(f"getComputedStyle({painted}).color") == "rgb(43, 122, 75)"
    assert "[32m" not in browser.ask("document.querySelector('tr.details').textContent")


def test_hostile_output_does_nothing(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.ask("document.getElementById('test-15').click()")
    said = browser.ask("document.querySelector('tr.details').textContent")
    assert said.count("</script><script>document.hacked = 1</script> <!-- <script> -->") == 5
    assert "\\ud800 lone \\x00\\x07 $run ${policy} red url(" in said
    assert "\\u202eright to left" in said
    assert browser.ask("document.hacked") is None
    assert browser.ask("document.scripts.length") == 2
    assert browser.ask("document.images.length") == 0
    assert browser.complaints() == []


def test_timeline(browser: Browser, report: Path) -> None:
    browser.open(report)
    lanes = browser.ask(
        "[...document.querySelectorAll('.lane')].map(lane => [...lane.children].map(bar => Number(bar.dataset.index)))"
    )
    run = sample()
    assert lanes == [[index for index, test in enumerate(run.tests) if test.worker == worker] for worker in range(run.jobs)]
    boxes = browser.ask(
        "[...document.querySelectorAll('.lane')].map(lane => [...lane.children].map(bar => bar.getBoundingClientRect().toJSON()))"
    )
    for lane in boxes:
        assert all(left["right"] <= right["left"] + 2.1 for left, right in itertools.pairwise(lane)), "no overlap"
    browser.ask("document.querySelector('.bar[data-index=\"15\"]').click()")
    assert browser.ask("document.activeElement.closest('tr').id") == "test-15"
    width = browser.ask("document.getElementById('lanes').clientWidth")
    browser.click("#zoom-in")
    assert browser.ask("document.getElementById('lanes').clientWidth") == 2 * width
    browser.click("#zoom-fit")
    assert browser.ask("document.getElementById('lanes').clientWidth") == width
    assert browser.ask("document.documentElement.scrollWidth") == 1280


def test_a_link_opens_its_test(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.ask("location.hash = '#test-250'")
    browser.wait_for("document.querySelector('tr.details')?.previousSibling.id === 'test-250'")


def test_dark_and_print(browser: Browser, report: Path) -> None:
    browser.open(report)
    colours = "(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))"
    light = browser.ask(colours)
    browser.emulate("dark")
    dark = browser.ask(colours)
    assert dark[0] != light[0]
    assert _brightness(dark[0]) < 60 < 200 < _brightness(dark[1])
    assert _brightness(light[0]) > 240
    browser.emulate("dark", "print")
    assert browser.ask(colours)[0] == "rgb(255, 255, 255)", "paper is white"
    assert base64.b64decode(browser.call("Page.printToPDF", printBackground=False)["data"]).startswith(b"%PDF")


def _brightness(colour: str) -> float:
    return sum(float(part) for part in colour[4:-1].split(",")) / 3


@pytest.mark.parametrize("width", [360, 700, 1280])
def test_it_fits(browser: Browser, report: Path, width: int) -> None:
    browser.resize(width, 800)
    browser.open(report)
    browser.ask("document.getElementById('test-15').click()")
    assert browser.ask("document.documentElement.scrollWidth") <= width


def test_ten_thousand_tests(browser: Browser, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    page.write(sample(10_000, 16), report)
    browser.open(report)
    assert browser.ask(STATUS) == "10,000 tests"
    assert browser.ask(f"{ROWS}.length") < 500, "rows are made as one scrolls"
    assert browser.ask("document.querySelectorAll('.bar').length") == 10_000
    took = browser.ask(
        "(start => { document.querySelector('th.wall button').click(); document.body.offsetHeight; return performance.now() - start })(performance.now())"
    )
    assert took < 20_000  # ms: a bound on a hang, not on speed
    made = browser.ask(f"{ROWS}.length")
    browser.ask("document.getElementById('end').scrollIntoView()")
    browser.wait_for(f"{ROWS}.length > {made}")
    assert browser.complaints() == []


@pytest.mark.parametrize("change", [{"tests": ()}, {"rootdir": "/", "args": (), "exitstatus": 77, "jobs": 1}])
def test_runs_that_are_not_ordinary(browser: Browser, tmp_path: Path, change: dict[str, Any]) -> None:
    run = replace(sample(5), **change)
    odd = [replace(test, outcome="</b>odd", sandbox=0, cpu=None, memory=None, wall=0.0, start=BEGUN) for test in run.tests]
    page.write(replace(run, tests=tuple(odd)), tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    assert browser.ask(STATUS) == f"{len(odd)} tests"
    if odd:
        browser.click("tr.test td.outcome")
        assert "ran in pytest's own process" in browser.ask("document.querySelector('tr.details').textContent")
    assert browser.complaints() == []
