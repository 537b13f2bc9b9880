"""What the documentation shows is what happens: its commands are run, in one directory for each section."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = pytest.mark.once("user")

DOCS = Path(__file__).parent.parent / "docs"
ANY = "…"


@dataclass
class Step:
    """A file to write, or a command and what it prints."""

    file: str = ""
    content: str = ""
    command: str = ""
    expected: list[str] = field(default_factory=list)


@dataclass
class Section:
    title: str
    steps: list[Step] = field(default_factory=list)


def sections(text: str) -> Iterator[Section]:
    """Those that have commands. A block of a language is a file when its first line is a comment with a name; `console`
    blocks are run; others are not."""
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        section = Section(part.partition("\n")[0])
        for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", part, re.MULTILINE | re.DOTALL):
            if language == "console":
                for line in block.splitlines():
                    if line.startswith("$ "):
                        section.steps.append(Step(command=line[2:]))
                    else:
                        section.steps[-1].expected.append(line)
            elif named := re.match(r"# ([\w./-]+\.(?:py|ini|toml))\n", block):
                section.steps.append(Step(file=named[1], content=block))
        if any(step.command for step in section.steps):
            yield section


def check(step: Step, output: str) -> None:
    """Every line that is shown, in this order; `…` is anything, and alone on a line any lines."""
    lines = output.splitlines()
    at, gap = 0, False
    for wanted in step.expected:
        if wanted == ANY:
            gap = True
            continue
        pattern = re.compile(".*".join(map(re.escape, wanted.split(ANY))))
        while gap and at < len(lines) and not pattern.fullmatch(lines[at]):
            at += 1
        assert at < len(lines), f"$ {step.command}\nwanted {wanted!r}, and it is not in\n{output}"
        assert pattern.fullmatch(lines[at]), f"$ {step.command}\nwanted {wanted!r}, but is {lines[at]!r} in\n{output}"
        at, gap = at + 1, False


ALL = [
    pytest.param(section, id=f"{name}: {section.title}")
    for name in ("pytest.md",)
    for section in sections((DOCS / name).read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("section", ALL)
def test_section(section: Section, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "CI", "BUILD_NUMBER"))
    }
    environment |= {
        "PATH": f"{os.path.dirname(sys.executable)}:{environment['PATH']}", "COLUMNS": "80", "LC_ALL": "C.UTF-8",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p isolation", "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DEBUG_TEMPROOT": str(tmp_path_factory.mktemp("root")),  # else the section would be in it
    }  # fmt: skip
    for step in section.steps:
        if step.file:
            (tmp_path / step.file).write_text(step.content)
            continue
        done = subprocess.run(
            ["bash", "-c", step.command], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
        )  # fmt: skip
        check(step, done.stdout)


def test_a_wrong_line_is_seen() -> None:
    step = Step(command="x", expected=["one", ANY, "three 3.… s"])
    check(step, "one\ntwo\nthree 3.25 s\n")
    for wrong in ("one\ntwo\n", "zero\nthree 3.25 s\n", "one\nthree 4 s\n", ""):
        with pytest.raises(AssertionError):
            check(step, wrong)
