"""What jupyter_kernel_test leaves out, by both routes."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kernel.conftest import USERS
from kernel.frontend import PATIENCE, Kernel, wait_for_heartbeat

from isolation import cli, registry
from isolation.hookspecs import CPU_LIMIT
from isolation.linux.cgroup import Hierarchy

Kernels = Callable[..., Kernel]


def test_runs_in_a_sandbox(kernel: Kernel) -> None:
    assert int(kernel.value("__import__('os').getpid()")) < 20
    assert kernel.value("__import__('socket').if_nameindex()") == "[(1, 'lo')]"
    assert kernel.value("(__import__('os').getpgid(0), __import__('os').getsid(0))") == "(2, 2)"


@USERS
def test_what_is_imported_late_is_the_real_thing(kernel: Kernel) -> None:
    late = ("dateutil", "dateutil.parser", "debugpy", "jupyter_client.manager", "platformdirs.unix", "psutil._common")
    assert kernel.value(f"{{*{late}}} & __import__('sys').modules.keys()") == "set()"
    reply = kernel.run("""
        import warnings
        from jupyter_client.jsonutil import parse_date
        from dateutil.parser import isoparse
        from dateutil.tz import tzlocal
        from platformdirs import user_cache_dir
        from jupyter_client import KernelManager

        assert isoparse.__module__ == "dateutil.parser.isoparser" and user_cache_dir("x").endswith("/x")
        for end in ("Z", ".1Z", ".000123Z", ".123456+00:00", "+0530", ".25-03:30"):
            ours, theirs = parse_date("2026-11-28T10:20:30" + end), isoparse("2026-11-28T10:20:30" + end)
            assert (ours, ours.utcoffset(), ours.isoformat()) == (theirs, theirs.utcoffset(), theirs.isoformat()), end
        assert parse_date("2026-11-28T24:00:00Z") == isoparse("2026-11-29T00:00:00Z")  # Python reads that from 3.13 on
        with warnings.catch_warnings(action="ignore"):
            assert parse_date("2026-11-28T10:20:30") == isoparse("2026-11-28T10:20:30").replace(tzinfo=tzlocal())
        try:
            parse_date("2026-13-28T10:20:30Z")
        except ValueError as error:
            print(error)
        assert get_ipython().kernel.parent.blocking_class is __import__("jupyter_client").BlockingKernelClient
        print(get_ipython().kernel.get_parent()["header"]["date"].utcoffset())
    """)
    assert reply.text == "month must be in 1..12\n0:00:00\n", reply.error


def test_interrupt(kernel: Kernel) -> None:
    assert kernel.interrupt_a_cell().content["ename"] == "KeyboardInterrupt"
    assert kernel.value("6*7") == "42"


def test_interrupt_reaches_a_child_process(kernel: Kernel) -> None:
    sleeping = kernel.send("import subprocess\nprint('on', flush=True)\nsubprocess.run(['sleep', '60'])")
    while kernel.client.get_iopub_msg(timeout=PATIENCE)["msg_type"] != "stream":
        pass
    time.sleep(0.3)
    kernel.manager.interrupt_kernel()
    assert kernel.collect(sleeping, 10).content["ename"] == "KeyboardInterrupt"


def test_interrupts_of_an_idle_kernel_change_nothing(kernel: Kernel) -> None:
    for _ in range(5):
        kernel.manager.interrupt_kernel()
    for _ in range(5):  # one that is on its way still may be for a cell
        reply = kernel.run("print(6*7)")
        if not reply.error.startswith("KeyboardInterrupt"):
            break
    assert (reply.status, reply.text) == ("ok", "42\n")


@USERS
def test_stdin(kernel: Kernel) -> None:
    asked = kernel.send("print(input('name? ') * 2)", allow_stdin=True)
    reply = kernel.collect(asked, on_input=lambda message: "ab" if message["content"]["prompt"] == "name? " else "?")
    assert reply.text == "abab\n"


@USERS
def test_comms(kernel: Kernel) -> None:
    kernel.run("from ipykernel.comm import Comm\nseen = []")
    code = "def opened(comm, message):\n comm.on_msg(lambda m: comm.send({'twice': m['content']['data']['n'] * 2}))\n"
    assert kernel.run(code + "get_ipython().kernel.comm_manager.register_target('t', opened)").status == "ok"
    session = kernel.client.session
    kernel.client.shell_channel.send(session.msg("comm_open", {"comm_id": "c", "target_name": "t", "data": {}}))
    kernel.client.shell_channel.send(session.msg("comm_msg", {"comm_id": "c", "data": {"n": 21}}))
    while True:
        message = kernel.client.get_iopub_msg(timeout=PATIENCE)
        if message["msg_type"] == "comm_msg":
            assert message["content"]["data"] == {"twice": 42}
            return


@USERS
def test_widgets(kernel: Kernel) -> None:
    reply = kernel.run("import ipywidgets\nslider = ipywidgets.IntSlider(value=3)\ndisplay(slider)")
    assert "application/vnd.jupyter.widget-view+json" in reply.data
    opened = next(m for m in reply.messages if m["msg_type"] == "comm_open" and "value" in m["content"]["data"]["state"])
    data = {"method": "update", "state": {"value": 7}}
    message = kernel.client.session.msg("comm_msg", {"comm_id": opened["content"]["comm_id"], "data": data})
    kernel.client.shell_channel.send(message)
    assert kernel.value("slider.value") == "7"


@USERS
def test_plot_inline(kernel: Kernel) -> None:
    reply = kernel.run("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()", timeout=600)
    assert "image/png" in reply.data, reply.text


@USERS
def test_debugger_stops_at_a_breakpoint(kernel: Kernel) -> None:
    sequence = iter(range(1, 100))

    def debug(command: str, **arguments: object) -> dict[str, object]:
        request = {"type": "request", "command": command, "seq": next(sequence), "arguments": arguments}
        reply = kernel.control("debug_request", request)
        assert reply.get("success"), reply
        return dict(reply)

    debug("initialize", clientID="test", adapterID="", pathFormat="path", linesStartAt1=True, columnsStartAt1=True)
    debug("attach")
    code = "def f(a):\n    b = a + 1\n    return b\nf(41)\n"
    source = debug("dumpCell", code=code)["body"]["sourcePath"]  # type: ignore[index]
    debug("setBreakpoints", breakpoints=[{"line": 3}], source={"path": source}, sourceModified=False)
    debug("configurationDone")
    running = kernel.send(code)
    while True:
        message = kernel.client.get_iopub_msg(timeout=PATIENCE)
        if message["msg_type"] == "debug_event" and message["content"]["event"] == "stopped":
            thread = message["content"]["body"]["threadId"]
            break
    frames = debug("stackTrace", threadId=thread)["body"]["stackFrames"]  # type: ignore[index]
    assert (frames[0]["name"], frames[0]["line"]) == ("f", 3)
    debug("continue", threadId=thread)
    assert kernel.collect(running).status == "ok"
    assert debug("inspectVariables")["body"]  # by way of the kernel's own shell
    debug("disconnect", restart=False, terminateDebuggee=False)


@USERS
def test_subshells(kernel: Kernel) -> None:
    subshell = kernel.control("create_subshell_request", {})["subshell_id"]
    sleeping = kernel.send("import time\nwhile not globals().get('done'): time.sleep(0.01)")
    message = kernel.client.session.msg("execute_request", {
        "code": "done = True", "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False,
    })  # fmt: skip
    message["header"]["subshell_id"] = subshell
    kernel.client.shell_channel.send(message)
    assert kernel.collect(sleeping).status == "ok"
    assert kernel.control("delete_subshell_request", {"subshell_id": subshell})["status"] == "ok"


def test_control_channel_while_busy(kernel: Kernel) -> None:
    sleeping = kernel.send("import time; print('on', flush=True); time.sleep(1000)")
    while kernel.client.get_iopub_msg(timeout=PATIENCE)["msg_type"] != "stream":
        pass
    assert kernel.control("kernel_info_request", {})["status"] == "ok"
    kernel.manager.interrupt_kernel()
    assert kernel.collect(sleeping).content["ename"] == "KeyboardInterrupt"


@USERS
def test_heartbeat(kernel: Kernel) -> None:
    kernel.client.hb_channel.unpause()
    time.sleep(1.5)
    wait_for_heartbeat(kernel.client)


def test_usage_report(kernels: Kernels) -> None:
    held = CPU_LIMIT in registry.get("namespace").features()  # not where an ordinary user has no cgroup
    kernel = kernels("argv", "--memory", "400M", *(["--cpus", "1"] if held else []))
    report = kernel.control("usage_request", {})
    assert report["host_virtual_memory"]["total"] == 400 << 20
    assert 0 < report["host_virtual_memory"]["used"] < 400 << 20
    assert report["cpu_count"] == (1 if held else os.cpu_count())


def test_a_limit_that_cannot_be_held_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Hierarchy, "can", lambda _self, _name: False)
    assert cli.main(["kernel", "install", "--prefix", str(tmp_path), "--cpus", "1"]) == 125
    assert "cgroup" in capfd.readouterr().err


@USERS
def test_large_message(kernel: Kernel) -> None:
    reply = kernel.run("from IPython.display import display\ndisplay({'x/y': 'a' * 200_000_000}, raw=True)", timeout=600)
    assert len(reply.data["x/y"]) == 200_000_000


@USERS
def test_large_request(kernel: Kernel) -> None:
    assert kernel.run(f"print(len('{'b' * 5_000_000}'))").text == "5000000\n"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(kernel: Kernel, method: str) -> None:
    code = f"import multiprocessing\nwith multiprocessing.get_context('{method}').Pool(2) as pool: print(pool.map(abs, [-1, 2]))"
    assert kernel.run(code).text == "[1, 2]\n"


@pytest.mark.once
def test_restart_25_times(kernel: Kernel) -> None:
    took = []
    kernel.manager.shutdown_wait_time = 600  # half of it for an end of its own
    for number in range(25):
        kernel.run(f"x = {number}")
        began = time.monotonic()
        kernel.manager.restart_kernel()
        took.append(time.monotonic() - began)
        kernel.wait_until_connected()
        assert kernel.run("print('x' in globals())").text == "False\n"
    assert max(took) < 300, took


def test_restart_now_while_busy(kernel: Kernel) -> None:
    kernel.send("while True: pass")
    time.sleep(0.3)
    kernel.restart(now=True)
    assert kernel.value("6*7") == "42"


def test_shutdown(kernel: Kernel) -> None:
    pid = kernel.pid
    kernel.value("6*7")
    process = kernel.manager.provisioner.process
    kernel.manager.shutdown_wait_time = 600  # half of it for an end of its own
    kernel.manager.shutdown_kernel()
    assert process.poll() == 0
    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize(
    ("code", "status"),
    [("import os; os._exit(3)", 3), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137), ("exit()", 0)],
)
def test_end_of_the_kernel_is_noticed(kernel: Kernel, code: str, status: int) -> None:
    process = kernel.manager.provisioner.process
    kernel.send(code)
    assert process.wait(60) == status
    assert not kernel.manager.is_alive()


@USERS
def test_history(kernel: Kernel) -> None:
    kernel.run("first = 1")
    kernel.run("second = 2")
    kernel.client.history(hist_access_type="tail", n=2)
    reply = kernel.client.get_shell_msg(timeout=PATIENCE)
    while reply["msg_type"] != "history_reply":
        reply = kernel.client.get_shell_msg(timeout=PATIENCE)
    assert [entry[2] for entry in reply["content"]["history"]] == ["first = 1", "second = 2"]


@USERS
def test_arguments_for_ipykernel(kernels: Kernels) -> None:
    kernel = kernels("argv", extra=("--HistoryManager.hist_file=:memory:",))
    assert kernel.value("get_ipython().history_manager.hist_file") == ":memory:"


def test_encryption_passes_untouched(kernels: Kernels) -> None:
    for name in ("argv", "provisioner"):
        kernel = kernels(name, encryption="required")
        assert kernel.value("6*7") == "42"
        assert kernel.manager.get_connection_info()["curve_publickey"]


@USERS
def test_connections_that_say_nothing(kernels: Kernels) -> None:
    """As VS Code makes them, to see whether somebody listens."""
    kernel = kernels("argv")
    info = kernel.manager.get_connection_info()
    for _ in range(20):
        for name in ("shell", "iopub", "stdin", "control", "hb"):
            socket.create_connection((info["ip"], info[f"{name}_port"]), 5).close()
    assert kernel.value("6*7") == "42"


def test_port_in_use_is_an_error(kernels: Kernels, capfd: pytest.CaptureFixture[str]) -> None:
    kernel = kernels("argv")
    command = kernel.manager.format_kernel_cmd()
    assert os.spawnv(os.P_WAIT, command[0], command) == 125
    assert "cannot listen on" in capfd.readouterr().err


def test_cell_time_limit(kernels: Kernels) -> None:
    kernel = kernels("argv", "--cell-timeout", "5s")
    assert kernel.run("import time\ntime.sleep(30)").content["ename"] == "KeyboardInterrupt"
    assert kernel.value("6*7") == "42"


def test_cell_that_ignores_interrupts(kernels: Kernels, capfd: pytest.CaptureFixture[str]) -> None:
    kernel = kernels("argv", "--cell-timeout", "5s")
    process = kernel.manager.provisioner.process
    kernel.send("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass")
    assert process.wait(PATIENCE) == 128 + signal.SIGKILL
    assert "a cell took longer than 5s" in capfd.readouterr().err


def test_out_of_memory_is_said(kernels: Kernels, capfd: pytest.CaptureFixture[str]) -> None:
    kernel = kernels("argv", "--memory", "300M")
    process = kernel.manager.provisioner.process
    kernel.send("x = bytearray(600 << 20)\nfor n in range(0, len(x), 4096): x[n] = 1")
    assert process.wait(PATIENCE) == 128 + signal.SIGKILL
    assert "out of memory" in capfd.readouterr().err


def test_wall_clock_limit_is_said(kernels: Kernels, capfd: pytest.CaptureFixture[str]) -> None:
    kernel = kernels("argv", "--timeout", "4s")
    assert kernel.manager.provisioner.process.wait(PATIENCE) == 124
    assert "time was up after 4 s" in capfd.readouterr().err


@pytest.mark.parametrize("route", ["argv", "provisioner"])
@pytest.mark.parametrize("encryption", ["disabled", "required"])
def test_the_notebook_is_told_why_its_kernel_ended(kernels: Kernels, route: str, encryption: str) -> None:
    kernel = kernels(route, "--memory", "300M", encryption=encryption)
    identity = kernel.send("x = bytearray(600 << 20)\nfor n in range(0, len(x), 4096): x[n] = 1")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        message = kernel.client.get_iopub_msg(timeout=PATIENCE)
        if message["msg_type"] == "stream":
            break
    assert message["parent_header"]["msg_id"] == identity
    assert message["content"] == {
        "name": "stderr",
        "text": "isolation: the kernel ran out of memory (its limit is 300M: --memory)\n",
    }
