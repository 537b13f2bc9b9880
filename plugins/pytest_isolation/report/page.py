"""A run as a file to look at: one HTML page that needs nothing else, or the same as JSON."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import secrets
from pathlib import Path
from string import Template
from typing import Any

from isolation.plain import json, os
from pytest_isolation.report.record import RunRecord

# What a browser can still open. JSON reports are never cut.
_TEXT_AT_MOST = 256 << 10  # characters of one message or section
_TEXTS_AT_MOST = 48 << 20  # of all of them
_LINES_AT_MOST = 1000  # changes, processes, refusals of one test


def check(path: str | os.PathLike[str]) -> None:
    """Whether `write` knows what to write there. Raises ValueError."""
    if Path(path).suffix not in (".html", ".json"):
        raise ValueError(f"a report is a file whose name ends in .html or .json, not {os.fspath(path)!r}")


def write(run: RunRecord, path: str | os.PathLike[str]) -> None:
    """A page or JSON, as the name's ending says; there is never half a file. Raises ValueError, OSError."""
    check(path)
    target = Path(path)
    content = render(run) if target.suffix == ".html" else json.dumps(run.to_json(), indent=1, allow_nan=False) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")  # not of `tempfile`: that ignores the umask
    try:
        with open(beside, "x", encoding="utf-8") as file:
            file.write(content)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def render(run: RunRecord) -> str:
    """The page. What tests have said is in it as JSON only; page.js makes text of it, never markup."""
    style, script = _resource("page.css"), _resource("page.js")
    # Should anything get past all that: the browser runs this script alone, and fetches nothing.
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    data = run.to_json()
    _shorten(data["tests"])
    page = Template(_resource("page.html"))
    return page.substitute(policy=policy, style=style, script=script, run=_embeddable(data))


def _resource(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embeddable(data: Any) -> str:
    """JSON that cannot end the element it stands in, nor begin a comment: ASCII without < > &."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _shorten(tests: list[dict[str, Any]]) -> None:
    """Cut what is too long for a browser, that of failures last, and say so."""
    left = _TEXTS_AT_MOST
    for test in sorted(tests, key=lambda test: test["outcome"] not in ("failed", "error")):
        for holder, key in ((test, "message"), *((section, "text") for section in test["sections"])):
            holder[key] = _cut(holder[key], min(left, _TEXT_AT_MOST))
            left = max(0, left - len(holder[key]))
        lists = ("changes", "processes", "refused")
        test["left_out"] = {key: len(test[key]) - _LINES_AT_MOST for key in lists if len(test[key]) > _LINES_AT_MOST}
        for key in test["left_out"]:
            del test[key][_LINES_AT_MOST:]


def _cut(text: str, limit: int) -> str:
    """Beginning and end of `text`."""
    if len(text) <= limit:
        return text
    head, tail = limit - limit // 2, limit // 2
    said = f"[… {len(text) - limit} characters are not in this page; a .json report has them …]"
    return f"{text[:head]}\n{said}\n{text[len(text) - tail :]}"
