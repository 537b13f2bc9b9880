"""examples/notebooks do what their README says."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from kernel.conftest import install

EXAMPLES = Path(__file__).parent.parent.parent / "examples/notebooks"
OPTIONS = ("--memory", "512M", "--pids", "64", "--cell-timeout", "8s", "--timeout", "2min")


@pytest.fixture
def notebooks(jupyter: Path, tmp_path: Path) -> Path:
    install(jupyter, "isolation", *OPTIONS)
    return Path(shutil.copytree(EXAMPLES, tmp_path / "notebooks"))


def execute(path: Path) -> list[nbformat.NotebookNode]:
    words = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", path.name]
    done = subprocess.run(words, cwd=path.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def text(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_tour(notebooks: Path) -> None:
    cells = execute(notebooks / "tour.ipynb")
    assert "memory 512M" in text(cells[0])
    assert text(cells[1]).startswith("process 2 of 2")
    assert "squares.csv" in text(cells[2])
    assert any("image/png" in output.get("data", {}) for output in cells[3].outputs)
    assert "refused" in text(cells[5])
    assert text(cells[7]) == "{} False\n"
    assert text(cells[8]) == "back at checkpoint good\n"
    assert text(cells[9]) == "{'apple': 3, 'pear': 4} True\n"
    assert not (notebooks / "squares.csv").exists()


def test_untrusted(notebooks: Path) -> None:
    tour = (notebooks / "tour.ipynb").read_text()
    cells = execute(notebooks / "untrusted.ipynb")
    assert len(cells) == 12
    for cell in cells:
        assert text(cell).startswith(("refused: ", "written, in a")), (cell.source, text(cell))
    assert (notebooks / "tour.ipynb").read_text() == tour


def test_grading(notebooks: Path) -> None:
    words = [sys.executable, "grade.py", "homework", "results.csv"]
    done = subprocess.run(words, cwd=notebooks, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    with open(notebooks / "results.csv", newline="") as file:
        found = {row["student"]: row for row in csv.DictReader(file)}
    points = {name: int(row["points"]) for name, row in found.items()}
    assert points == {"ada": 4, "ben": 3, "cleo": 2, "dan": 0, "eve": 0}
    assert "KeyboardInterrupt" in found["cleo"]["remark"]
    assert "ended" in found["dan"]["remark"] or "MemoryError" in found["dan"]["remark"]
    assert "NameError" in found["eve"]["remark"]
