"""ipykernel's own tests, of all that a frontend can ask of a kernel: of a plain one, and of one in a sandbox.

    python benchmarks/kernel_conformance.py [--backend microvm] [-k EXPRESSION]

Its tests start kernels by the name `python3`. They are run as they are, and twice more with that name given to a kernelspec
of ours: with ports, and with a provisioner. A test that then ends in another way is a difference: a fault of ours, or one
that EXPLAINED tells the reason of. The exit status is 0 if no other difference is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from _common import CHECKOUT, clean_environment, default_cache, make_venv, run_to_log, timed_run
from conformance import command_line, compare, outcomes
from suites import Options, Outcome, Suite, fetch

VERSION = "7.4.0"
NEEDS = ["pytest==9.2.0", "pytest-asyncio", "pytest-timeout", "flaky", "ipyparallel", "psutil", "matplotlib", "trio"]
FILES = (
    "test_async.py test_comm.py test_connect.py test_curve.py test_debugger.py test_displayhook.py test_kernel.py "
    "test_matplotlib_eventloops.py test_message_spec.py test_start_kernel.py test_subshell_wedge.py test_subshells.py"
).split()
PYTEST = ["-p", "no:isolation", "-o", "filterwarnings=", "-o", "asyncio_default_fixture_loop_scope=function"]
PYTEST += [f"tests/{file}" for file in FILES]
# The first machine of a kind takes longer to start than these tests wait.
FIRST_START = """
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(startup_timeout=600, kernel_name="python3")
client.stop_channels()
manager.shutdown_kernel(now=True)
"""
_ELSEWHERE = "it names a directory of the machine's that the kernel is to read or write: not there without --mount"
EXPLAINED = {
    "tests/test_kernel.py::test_save_history": _ELSEWHERE,
    "tests/test_kernel.py::test_sys_path_profile_dir": _ELSEWHERE,
}


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--backend", default="namespace")
    options = parser.parse_args()
    source, python = prepare()
    logs = default_cache("kernel-conformance")
    logs.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Outcome]] = {}
    for kind, words in (("plain", None), ("ports", list[str]()), ("provisioner", ["--provisioner"])):
        environ = {"JUPYTER_PLATFORM_DIRS": "1"}
        if words is not None:
            install: list[str | Path] = [python.parent / "isolation", "kernel", "install", "--name", "python3"]
            install += ["--prefix", logs / kind, "--backend", options.backend, *words]
            run_to_log(install, logs / "install.log", "installing a kernelspec")
            environ["JUPYTER_PATH"] = f"{logs / kind}/share/jupyter"
        environment = clean_environment(python, **environ)
        timed_run([python, "-c", FIRST_START], cwd=source, log=logs / "start.log", timeout=600, environment=environment)
        found[kind] = outcomes(logs / kind, python, source, PYTEST, options.expression, environ)
    status = 0
    for kind in ("ports", "provisioner"):
        print(f"\n## {kind}, {options.backend}\n")
        status |= compare(found["plain"], found[kind], EXPLAINED, verbose=options.verbose)
    return status


def prepare() -> tuple[Path, Path]:
    """The unpacked sdist, without the package itself, and an interpreter that has that ipykernel and this checkout."""
    cache = default_cache("suites")
    options = Options(sys.executable, VERSION, cache, flags=(), plain_only=False, repeat=1, timeout=None)
    source = fetch(Suite("ipykernel", VERSION, "tests"), options)
    package = source / "ipykernel"
    if package.exists():
        package.rename(source / "ipykernel.unused")  # it would be imported instead of the one that is installed
    needs = [f"ipykernel=={VERSION}", *NEEDS]
    return source, make_venv(cache / "venvs" / "ipykernel-conformance", needs, checkout=CHECKOUT)


if __name__ == "__main__":
    sys.exit(main())
