"""`isolation kernel install | list | remove`, and what a kernelspec holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from isolation_kernel.options import Options, parse
from kernel.conftest import install

from isolation import cli

pytestmark = pytest.mark.once("user")


def spec(prefix: Path, name: str) -> dict[str, object]:
    return dict(json.loads((prefix / f"share/jupyter/kernels/{name}/kernel.json").read_text()))


def test_install_list_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("JUPYTER_PATH", f"{tmp_path}/share/jupyter")
    install(tmp_path, "mine", "--memory", "512M", "--display-name", "Mine", "--mount", f"{tmp_path}:/data:ro")
    found = spec(tmp_path, "mine")
    assert found["display_name"] == "Mine"
    assert found["interrupt_mode"] == "signal"
    assert found["metadata"] == {"debugger": True, "supported_encryption": ["curve"]}
    capsys.readouterr()
    assert cli.main(["kernel", "list"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mine"))
    assert "--memory 512M" in line
    assert f"--mount {tmp_path}:/data:ro" in line
    assert cli.main(["kernel", "remove", "mine"]) == 0
    assert not (tmp_path / "share/jupyter/kernels/mine").exists()
    assert cli.main(["kernel", "remove", "mine"]) == 125


def test_another_kernel_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_PATH", f"{tmp_path}/share/jupyter")
    other = tmp_path / "share/jupyter/kernels/other"
    other.mkdir(parents=True)
    (other / "kernel.json").write_text(json.dumps({"argv": ["python", "-m", "ipykernel"], "language": "python"}))
    assert cli.main(["kernel", "remove", "other"]) == 125
    assert other.exists()


def test_provisioner_is_named(tmp_path: Path) -> None:
    install(tmp_path, "mine", "--provisioner")
    metadata = spec(tmp_path, "mine")["metadata"]
    assert metadata["kernel_provisioner"]["provisioner_name"] == "isolation"  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--memory", "many"], "is not a size"),
        (["--notebook", "everywhere"], "is not one of overlay, ro, rw, none"),
        (["--network", "some"], "is not one of"),
        (["--mount", "/does/not/exist"], "does not exist"),
        (["--export", "/does/not/exist"], "does not exist"),
        (["--cell-timeout", "soon"], "is not a time"),
        (["--name", "a/b"], "is not"),
        (["--backend", "none"], "no backend 'none'"),
        (["--backend", "microvm", "--network", "host"], "--network none, allow:… or nat"),
        (["--backend", "microvm", "--notebook", "rw"], "%isolation export only"),
        (["--frobnicate"], "unrecognized"),
    ],
)
def test_mistakes_are_told_at_once(tmp_path: Path, options: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["kernel", "install", "--prefix", str(tmp_path), *options])
    except SystemExit as error:
        code = int(str(error.code))
    assert code == 125
    assert said in capfd.readouterr().err
    assert not (tmp_path / "share").exists()


def test_options_survive_the_command_line() -> None:
    options = Options(memory="1G", mount=("/a:/b:ro", "/c:/d:rw"), env=("A=b c",), notebook="ro", cell_timeout="3s")
    line = parse([*options.words(), "-f", "file.json", "--debug", "--memory", "not ours"])
    assert line.options == options
    assert (line.connection_file, line.forwarded) == ("file.json", ("--debug", "--memory", "not ours"))


def test_nothing_beside_the_notebook_is_imported_on_the_host(jupyter: Path, tmp_path: Path) -> None:
    """`python -m` alone would take json.py from the notebook's directory, and run it before there is a sandbox."""
    for name in ("json", "isolation_kernel", "isolation", "socket", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open('{tmp_path}/executed', 'w')")
    words = [str(word) for word in spec(jupyter, "argv")["argv"]]  # type: ignore[attr-defined]
    words[words.index("{connection_file}")] = "missing.json"
    assert os.path.isabs(words[0])
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "json.py")}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 125
    assert "connection file" in done.stderr
    assert not (tmp_path / "executed").exists()
    subprocess.run([sys.executable, "-m", "json.tool"], cwd=tmp_path, env=env, capture_output=True)
    assert (tmp_path / "executed").exists()  # that is how it would be


def test_listed_among_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "a Jupyter kernel whose cells run in a sandbox" in " ".join(capsys.readouterr().out.split())
