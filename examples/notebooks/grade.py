"""Grade a folder of notebooks: `python grade.py homework results.csv`.

Every notebook gets a kernel of its own, fresh and sealed, with limits; one student's code can neither see another's nor this
machine. What is expected never enters a kernel: the checks' inputs do, and the answers come out and are compared here.
The kernel is called `isolation`; to install it with limits that fit:

    isolation kernel install --memory 512M --pids 64 --cell-timeout 5s --timeout 2min --notebook none
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat.v4 import new_code_cell

# Name of the function, its argument, what it should return.
CHECKS: tuple[tuple[str, Any, Any], ...] = (
    ("mean", [1, 2, 3], 2.0),
    ("mean", [0.25, 0.75], 0.5),
    ("words", "a B a", {"a": 2, "b": 1}),
    ("words", "", {}),
)
_ANSWER_AT_MOST = 10_000  # characters


class Grade(NamedTuple):
    student: str
    points: int
    of: int
    remark: str


def question(number: int, name: str, argument: Any) -> str:
    """A cell that prints one answer as JSON, behind a mark that nobody could know before."""
    return f"import json\nprint('answer {number}', json.dumps({name}({argument!r})))"


def answer(cell: Any, number: int) -> Any:
    """What a cell has printed; None where that is no answer. It is a student's text: JSON, and not too much of it."""
    text = "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")
    mark = f"answer {number} "
    if not text.startswith(mark) or len(text) > _ANSWER_AT_MOST:
        return None
    try:
        return json.loads(text[len(mark) :])
    except (ValueError, RecursionError):
        return None


def grade(path: Path) -> Grade:
    """Run one notebook, then the checks, in one kernel that ends afterwards."""
    notebook = nbformat.read(path, 4)
    checks = [new_code_cell(question(number, name, argument)) for number, (name, argument, _) in enumerate(CHECKS)]
    notebook.cells += checks
    client = NotebookClient(notebook, kernel_name="isolation", allow_errors=True, timeout=60)
    remark = ""
    try:
        client.execute(cwd=str(path.parent))
    except DeadKernelError:
        remark = "the kernel was ended: out of memory, or out of time"
    except CellTimeoutError:
        remark = "a cell took too long"
    points = sum(
        answer(cell, number) == expected for number, (cell, (*_, expected)) in enumerate(zip(checks, CHECKS, strict=True))
    )
    return Grade(path.stem, points, len(CHECKS), remark or "; ".join(dict.fromkeys(errors(notebook))))


def errors(notebook: Any) -> Iterator[str]:
    """The names of the exceptions that ended cells."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                yield str(output.ename)[:100]


def main(folder: str, results: str) -> None:
    with open(results, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(Grade._fields)
        for path in sorted(Path(folder).glob("*.ipynb")):
            done = grade(path)
            table.writerow(done)
            print(f"{done.student:12} {done.points} of {done.of}  {done.remark}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
