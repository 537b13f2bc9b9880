"""Checkpoints of a kernel in a container: what goes back, what stays usable, and what is refused."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from isolation_kernel.inside.checkpoint import supervisor
from kernel.conftest import ROUTES
from kernel.frontend import PATIENCE, Kernel
from kernel.test_frontends import descendants
from nbclient import NotebookClient

pytestmark = pytest.mark.once("user")

Kernels = Callable[..., Kernel]

START = "import os, random, sys\nimport numpy as np\nx = np.random.random() and 1"


@pytest.fixture(params=ROUTES)
def kernel(request: pytest.FixtureRequest, kernels: Kernels) -> Kernel:
    """A kernel by either route, with a checkpoint "a" of `x = 1`."""
    kernel = kernels(request.param)
    assert kernel.run(START).status == "ok"
    reply = kernel.run("%isolation checkpoint a")
    assert reply.status == "ok", reply.error
    assert reply.text.startswith("checkpoint a in ")
    return kernel


@pytest.fixture
def one(kernels: Kernels) -> Kernel:
    """A kernel, without any checkpoint."""
    return kernels("argv")


def back(kernel: Kernel, name: str = "a") -> None:
    reply = kernel.run(f"%isolation rollback {name}")
    assert (reply.status, reply.text) == ("ok", f"back at checkpoint {name}\n")


def test_variables_and_files_go_back(kernel: Kernel, tmp_path: Path) -> None:
    (tmp_path / "notebook" / "data.txt").write_text("on the host")
    kernel.run("open('kept', 'w').write('1'); open('/tmp/kept', 'w').write('1'); os.mkdir('empty')")
    assert kernel.run("%isolation checkpoint b").status == "ok"
    state = "(x, sorted(os.listdir()), open('kept').read(), open('/tmp/kept').read(), open('data.txt').read())"
    for _ in range(3):
        kernel.run("x = 2; os.remove('data.txt'); os.rmdir('empty'); open('kept', 'w').write('2'); open('/tmp/new', 'w')")
        assert kernel.run("open('data.txt', 'w').write('other')").status == "ok"
        assert kernel.value(state) == "(2, ['data.txt', 'kept'], '2', '1', 'other')"
        back(kernel, "b")
        assert kernel.value(state) == "(1, ['data.txt', 'empty', 'kept'], '1', '1', 'on the host')"
        assert kernel.value("os.path.exists('/tmp/new')") == "False"
    back(kernel, "a")
    assert kernel.value("(x, os.listdir(), os.path.exists('/tmp/kept'))") == "(1, ['data.txt'], False)"
    assert "nothing was changed" in kernel.run("%isolation changes").text
    back(kernel, "b")  # later than the one that it is at
    assert kernel.value("sorted(os.listdir())") == "['data.txt', 'empty', 'kept']"
    assert sorted(os.listdir(tmp_path / "notebook")) == ["data.txt"]


def test_what_is_of_a_context_goes_back(one: Kernel) -> None:
    one.run(
        "import contextvars, decimal, os, numpy as np\ndecimal.getcontext().prec = 5; np.seterr(all='raise')\n"
        "v = contextvars.ContextVar('v'); v.set(7); open('data', 'wb').write(b'x' * 99 + b'y' * 100_000)\n"
        "raw, f = open('data', 'rb', buffering=0), open('data'); raw.read(99); f.read(99)\nos.umask(0o027)\n"
        "%isolation checkpoint a"
    )
    state = "(decimal.getcontext().prec, np.geterr()['over'], v.get(), set(raw.read()), set(f.read()), os.umask(0o027))"
    for _ in range(3):
        assert one.value(state) == "(5, 'raise', 7, {121}, {'y'}, 23)"
        one.run("decimal.getcontext().prec = 9; np.seterr(all='ignore'); v.set(8)")
        back(one)


def test_nothing_is_written_into_what_has_come_back(one: Kernel) -> None:
    """By what was started since, and runs until it is ended."""
    one.run("import subprocess, threading, time\n%isolation checkpoint a")
    for _ in range(5):
        one.run(
            "def write():\n    while True: open('/tmp/thread', 'a').write('x')\n"
            "threading.Thread(target=write, daemon=True).start()\n"
            "p = subprocess.Popen(['sh', '-c', 'while :; do echo x >> /tmp/process; done']); time.sleep(0.05)"
        )
        back(one)
        assert one.value("sorted(n for n in __import__('os').listdir('/tmp') if n in ('thread', 'process'))") == "[]"


def test_output_before_a_rollback_arrives(kernel: Kernel) -> None:
    for _ in range(3):
        reply = kernel.run("for n in range(3000): print('y' * 100)\n%isolation rollback a")
        assert reply.text.count("y" * 100 + "\n") == 3000
        assert reply.text.endswith("back at checkpoint a\n")


def test_checkpoints_are_listed_and_forgotten(one: Kernel) -> None:
    assert "no checkpoint" in one.run("%isolation").text
    one.run("x = 1")
    for name in "abcd":
        assert one.run(f"%isolation checkpoint {name}").status == "ok"
    assert "kept      a, b, c, d\n" in one.run("%isolation").text
    assert one.run("%isolation forget b").status == "ok"
    assert "there is no checkpoint 'b'; there is: a, c, d" in one.run("%isolation rollback b").error
    assert "there is no checkpoint 'b'" in one.run("%isolation forget b").error
    assert "%isolation forget NAME" in one.run("%isolation forget").error
    assert one.run("x = 2\n%isolation checkpoint e").status == "ok"
    for name, value in (("a", "1"), ("e", "2")):
        back(one, name)
        assert one.value("x") == value
    assert one.run("%isolation forget a").status == "ok"  # by a kernel that has come back
    assert "kept      c, d, e\n" in one.run("%isolation").text


@pytest.mark.parametrize("line", ["checkpoint b", "rollback a"])
def test_interrupts_meanwhile(one: Kernel, line: str) -> None:
    """They come too early, and stop the cell; or too late, and stop nothing. Never half-way."""
    one.run("import os; x = 1\n%isolation checkpoint a")
    for number in range(25):
        one.run("x = 2; open('file', 'w').write('2')")
        sent = one.send(f"%isolation {line}")
        time.sleep(number * 0.0015)
        one.manager.interrupt_kernel()
        reply = one.collect(sent)
        assert reply.status == "ok" or reply.error.startswith("KeyboardInterrupt"), reply.error
        look = "print((x, os.path.exists('file'), os.getcwd() == os.path.realpath('.')))"
        state = one.run(look)
        if state.error.startswith("KeyboardInterrupt"):  # so late that it is for this one: nobody says when it arrives
            state = one.run(look)
        assert state.text in ("(2, True, True)\n", "(1, False, True)\n")
    assert one.run("%isolation checkpoint c").status == "ok"


@pytest.mark.parametrize(
    "code",
    [
        "import warnings; warnings.simplefilter('error')",
        "import socket; socket.setdefaulttimeout(0.2)",
        "%%bash\necho from bash",
        "import multiprocessing as mp; lock = mp.Lock(); lock.acquire()",
        "import asyncio\nawait asyncio.to_thread(int)",
        "from multiprocessing.shared_memory import SharedMemory as S; s = S(create=True, size=9); s.close(); s.unlink(); del s",
    ],
)
def test_what_is_no_reason_to_refuse(kernels: Kernels, code: str) -> None:
    kernel = kernels("argv")
    assert kernel.run(code).status == "ok"
    assert kernel.run("import time; x = 1").status == "ok"
    reply = kernel.run("%isolation checkpoint a")
    assert reply.status == "ok", reply.error
    for _ in range(2):
        kernel.run("x = 2; time.sleep(0.3); lock.release() if 'lock' in globals() else None")
        assert kernel.run("%isolation rollback a").status == "ok"
        assert kernel.run("x").data["text/plain"] == "1"
    if "lock" in code:
        assert kernel.run("lock.acquire(block=False)").data["text/plain"] == "False"
    else:
        assert kernel.run(code).status == "ok"


def test_a_redirected_stream_that_cannot_be_flushed(one: Kernel) -> None:
    one.run("x = 1\nimport contextlib\nclass Out:\n    def write(self, text): pass\n%isolation checkpoint a")
    reply = one.run("x = 2\nwith contextlib.redirect_stdout(Out()): get_ipython().run_line_magic('isolation', 'rollback a')")
    assert reply.text == "back at checkpoint a\n"
    assert one.value("x") == "1"


def test_only_cells_go_back(one: Kernel) -> None:
    one.run("%isolation checkpoint a")
    one.run("from ipykernel.comm import Comm\nsaid = []")
    one.run(
        "def opened(comm, message):\n    for line in ('checkpoint b', 'rollback a'):\n"
        "        try: get_ipython().run_line_magic('isolation', line)\n        except Exception as error: said.append(str(error))\n"
        "get_ipython().kernel.comm_manager.register_target('t', opened)"
    )
    session = one.client.session
    one.client.shell_channel.send(session.msg("comm_open", {"comm_id": "c", "target_name": "t", "data": {}}))
    assert one.value("said") == (
        '["a checkpoint is taken when a cell has ended; this is none (a widget\'s callback?)", '
        '"only a cell can go back; this is none (a widget\'s callback?)"]'
    )
    twice = one.run("%isolation checkpoint b\n%isolation checkpoint c")
    assert "this cell takes a checkpoint already (b)" in twice.error
    assert "there is: a" in one.run("%isolation rollback b").error


def test_no_room_for_another_process(kernels: Kernels) -> None:
    """The kernel that is there stays, whole; and so does the checkpoint."""
    kernel = kernels("argv", "--pids", "20")
    kernel.run("import subprocess; x = 1\n%isolation checkpoint a")
    kernel.run(
        "x = 2; open('file', 'w')\nmore = []\ntry:\n    while True: more.append(subprocess.Popen(['sleep', '1000']))\nexcept OSError: pass"
    )
    reply = kernel.run("%isolation rollback a")
    assert "cannot go back to checkpoint 'a': Resource temporarily unavailable" in reply.error
    assert kernel.value("(x, __import__('os').listdir())") == "(2, ['file'])"
    kernel.run("for p in more: p.kill(); p.wait()")
    back(kernel)
    assert kernel.value("(x, __import__('os').listdir())") == "(1, [])"


def test_a_checkpoint_that_fails_replaces_none(kernels: Kernels) -> None:
    kernel = kernels("argv", "--disk", "4M")
    kernel.run("x = 1\n%isolation checkpoint a")
    kernel.run("x = 2\nimport os, errno\ntry:\n    for n in range(10**6): os.mkdir(f'/tmp/{n}')\nexcept OSError: pass")
    assert kernel.run("%isolation checkpoint a").status == "error"
    back(kernel)
    assert kernel.value("x") == "1"


def test_random_numbers_go_back(kernel: Kernel) -> None:
    first = kernel.value("(random.random(), np.random.random())")
    back(kernel)
    assert kernel.value("(random.random(), np.random.random())") == first


def test_the_shell_is_the_same(one: Kernel) -> None:
    """What its user has made of it: history, magics, hooks, handlers of loggers, redirections."""
    one.run(
        "import logging, sys\nlog = logging.getLogger('mine'); log.addHandler(logging.StreamHandler(sys.stderr))\n"
        "ip = get_ipython(); runs = []\nip.events.register('pre_run_cell', lambda info: runs.append(1))\n"
        "out, shell_kernel = sys.stdout, ip.kernel\n"
        "ip.register_magic_function(lambda line: print('magic', line), 'line', 'mine')\n%precision 3"
    )
    one.run("1 + 1")
    one.run("%isolation checkpoint a")
    one.run("3 + 3")
    back(one)
    assert one.run("%mine here").text == "magic here\n"
    assert one.run("log.warning('logged')").text == "logged\n"
    assert one.run("3.14159").data["text/plain"] == "3.142"
    assert one.value("len(runs)") == "6"
    assert one.value("out is sys.stdout") == "True"
    assert one.value("ip is get_ipython() and ip.kernel is not shell_kernel") == "True"
    reply = one.run("Out")
    assert reply.data["text/plain"].startswith("{1: '%.3f', 2: 2,")
    assert "3 + 3" not in one.run("%history").text
    # ipykernel reads what a child prints on a thread of its own, and may be later than the end of the cell.
    assert one.run("import os, time; os.system('echo from a child'); time.sleep(0.5)").text == "from a child\n"
    assert reply.content["execution_count"] > 3


def test_widgets_stay_connected(one: Kernel) -> None:
    reply = one.run("import ipywidgets\nslider = ipywidgets.IntSlider(value=3)\ndisplay(slider)")
    opened = next(m for m in reply.messages if m["msg_type"] == "comm_open" and "value" in m["content"]["data"]["state"])
    one.run("%isolation checkpoint a")
    one.run("slider.value = 5")
    back(one)
    assert one.value("slider.value") == "3"
    data = {"method": "update", "state": {"value": 7}}
    message = one.client.session.msg("comm_msg", {"comm_id": opened["content"]["comm_id"], "data": data})
    one.client.shell_channel.send(message)
    assert one.value("slider.value") == "7"
    told = [m["content"]["data"]["state"] for m in one.run("slider.value = 9").messages if m["msg_type"] == "comm_msg"]
    assert {"value": 9} in told


def test_a_scientific_stack_goes_on(one: Kernel) -> None:
    one.run("import numpy as np, matplotlib.pyplot as plt\na = np.random.rand(300, 300); (a @ a).sum()", 120)
    one.run("plt.plot([1]); plt.show()", 120)
    assert one.run("%isolation checkpoint a").status == "ok"
    for _ in range(3):
        back(one)
        assert one.value("np.allclose(a @ a, np.einsum('ij,jk', a, a))") == "True"
        assert "image/png" in one.run("plt.plot([1, 2]); plt.show()").data


def test_names(one: Kernel) -> None:
    one.run("n = 0")
    assert "wants a name" in one.run("%isolation checkpoint ''").error
    assert "there is no checkpoint 'a'; there is: none" in one.run("%isolation rollback a").error
    for number in range(4):
        assert one.run(f"n = {number}\n%isolation checkpoint c{number}").status == "ok"
    assert "is all that one kernel may have" in one.run("%isolation checkpoint more").error
    assert one.run("n = 77\n%isolation checkpoint c0").status == "ok"
    for name, value in (("c2", "2"), ("c1", "1"), ("c0", "77"), ("c3", "3")):
        back(one, name)
        assert one.value("n") == value
    assert "there is: c1, c2, c3, c0" in one.run("%isolation rollback zero").error


def test_taken_when_the_cell_has_ended(one: Kernel) -> None:
    one.run("%isolation checkpoint a\nx = 'end of the cell'")
    one.run("x = 2")
    back(one)
    assert one.value("x") == "end of the cell"
    assert one.run("%isolation checkpoint b\n1/0").error == "ZeroDivisionError: division by zero"
    assert "there is no checkpoint 'b'" in one.run("%isolation rollback b").error
    late = one.run(
        "import threading, time\n%isolation checkpoint b\nthreading.Thread(target=time.sleep, args=[9], name='late').start()"
    )
    assert late.status == "error"
    assert "thread 'late'" in late.error
    assert one.run("6*7").data["text/plain"] == "42"
    assert "there is no checkpoint 'b'" in one.run("%isolation rollback b").error


def test_cells_in_the_queue_behind_a_checkpoint_are_run(one: Kernel) -> None:
    sent = [one.send(code) for code in ("x = 1", "%isolation checkpoint a", "x += 1", "x += 1", "print(x)")]
    assert [one.collect(identity).status for identity in sent[:-1]] == ["ok"] * 4
    assert one.collect(sent[-1]).text == "3\n"


def test_cells_in_the_queue_behind_a_rollback_are_run(kernel: Kernel) -> None:
    """As a frontend sends them that runs all cells; by the kernel that has come back."""
    for _ in range(3):
        codes = ["x = 2", "%isolation rollback a", "x += 10", "print(x)", "1/0", "print('not this one')"]
        sent = [kernel.send(code) for code in codes]
        replies = [kernel.collect(identity) for identity in sent]
        assert [reply.status for reply in replies[:4]] == ["ok"] * 4
        assert replies[3].text == "11\n"
        assert replies[4].error == "ZeroDivisionError: division by zero"
        assert replies[5].status in ("error", "aborted")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import signal; signal.alarm(100)", "a timer (signal.setitimer"),
        ("import _thread, time; _thread.start_new_thread(time.sleep, (100,))", "1 threads of a library"),
        ("import threading; t = threading.Timer(100, print); t.name = 'mine'; t.daemon = True; t.start()", "thread 'mine'"),
        ("from concurrent.futures import ThreadPoolExecutor as E; e = E(); e.submit(int).result()", "ThreadPoolExecutor"),
        ("import subprocess; p = subprocess.Popen(['sleep', '100'])", "(sleep 100)"),
        ("import subprocess; subprocess.Popen(['sleep', '100'], start_new_session=True)", "(sleep 100)"),
        ("import socket; s = socket.create_server(('127.0.0.1', 0))", "socket ('127.0.0.1', "),
        ("import socket; s = socket.socketpair()", "socket (unnamed)"),
        ("import os; p = os.pipe()", "pipe (descriptor"),
        ("f = open('log', 'a')", "/log"),
        ("import numpy as np; m = np.memmap('m', 'i4', 'w+', shape=10)", "/m"),
        ("import mmap; m = mmap.mmap(-1, 4096)", "/dev/zero"),
        ("from multiprocessing.shared_memory import SharedMemory as S; s = S(create=True, size=9)", "/dev/shm/"),
        ("import asyncio\nasync def sleep(): await asyncio.sleep(100)\nt = asyncio.create_task(sleep(), name='mine')", "'mine' (sleep)"),
        ("import asyncio\ndef later(): pass\nh = asyncio.get_event_loop().call_later(100, later)", "timer of the event loop (later)"),
        ("import asyncio\nl = asyncio.new_event_loop()", "socket (unnamed)"),
    ],
)  # fmt: skip
def test_refused(kernels: Kernels, code: str, reason: str) -> None:
    kernel = kernels("argv")
    assert kernel.run(code).status == "ok"
    reply = kernel.run("%isolation checkpoint a")
    assert "UsageError: a checkpoint is a fork" in reply.error
    assert reason in reply.error
    assert "--backend microvm" in reply.error
    assert kernel.value("6*7") == "42"
    assert "there is no checkpoint" in kernel.run("%isolation rollback a").error


def test_allowed_when_it_has_ended(one: Kernel) -> None:
    one.run(
        "import asyncio, subprocess, threading, multiprocessing as mp\n"
        "t = threading.Thread(target=int); t.start(); t.join(); subprocess.run(['true'])\n"
        "with mp.get_context('fork').Pool(2) as pool: pool.map(abs, [1])\npool.join(); del pool\n"
        "await asyncio.sleep(0)\nopen('file', 'w').write('x'); readable = open('file')"
    )
    reply = one.run("%isolation checkpoint a")
    assert reply.status == "ok", reply.error
    one.run("readable.read()")
    back(one)
    assert one.value("readable.seek(0) or readable.read()") == "x"


def test_joblib_may_have_been_used(one: Kernel) -> None:
    """Its workers are gone when they were asked to go; its resource tracker stays, as that of multiprocessing does."""
    one.run(
        "from joblib import Parallel, delayed\nfrom joblib.externals.loky import get_reusable_executor\n"
        "done = Parallel(n_jobs=2)(delayed(abs)(x) for x in (-1, 2))"
    )
    assert "process" in one.run("%isolation checkpoint a").error
    one.run("get_reusable_executor().shutdown(wait=True)")
    reply = one.run("%isolation checkpoint a")
    assert reply.status == "ok", reply.error
    back(one)
    for _ in range(2):
        assert one.value("Parallel(n_jobs=2)(delayed(abs)(x) for x in (-3, 4)), done") == "[3, 4] [1, 2]"
        one.run("get_reusable_executor().shutdown(wait=True)")
        assert one.run("%isolation checkpoint b").status == "ok"
        one.run("%isolation rollback b")


def test_what_was_started_since_is_ended(kernel: Kernel) -> None:
    kernel.run("import subprocess, threading\np = subprocess.Popen(['sleep', '1000']); os.system('setsid sleep 1001 &')")
    kernel.run("t = threading.Thread(target=lambda: __import__('time').sleep(1000), daemon=True); t.start()")
    back(kernel)
    names = kernel.value("sorted(open(f'/proc/{p}/comm').read().strip() for p in os.listdir('/proc') if p.isdigit())").split(
        ", "
    )
    assert "'sleep'" not in str(names)
    assert kernel.value("__import__('threading').active_count() < 10") == "True"


def test_again_and_again(kernel: Kernel) -> None:
    """Nothing grows: processes, descriptors, threads."""
    count = "(sum(p.isdigit() for p in os.listdir('/proc')), len(os.listdir('/proc/self/fd')), len(os.listdir('/proc/self/task')))"
    back(kernel)
    before = eval(kernel.value(count))
    for number in range(12):
        kernel.run(f"x = {number}")
        if number % 3 == 0:
            assert kernel.run("%isolation checkpoint b").status == "ok"
        back(kernel, "ab"[number % 2])
    back(kernel)
    after = eval(kernel.value(count))
    assert after[0] <= before[0] + 2  # the checkpoint b, and perhaps what has not been reaped yet
    assert after[1] <= before[1] + 3  # frontends have as many connections as they like
    assert after[2] <= before[2]


def test_a_lost_checkpoint(kernel: Kernel) -> None:
    kernel.run("x = 2; open('file', 'w').write('2')")
    kill = (
        "[os.kill(int(p), 9) for p in os.listdir('/proc') if p.isdigit() and 'iso-check' in open(f'/proc/{p}/comm').read()]"
    )
    assert kernel.run(kill).data["text/plain"] == "[None]"
    reply = kernel.run("%isolation rollback a")
    assert "cannot go back to checkpoint 'a': the process that kept it has ended" in reply.error
    assert kernel.value("(x, open('file').read())") == "(2, '2')"
    assert kernel.run("%isolation checkpoint a").status == "ok"
    kernel.run("x = 3")
    back(kernel)
    assert kernel.value("x") == "2"


def test_the_end_after_a_rollback(kernel: Kernel) -> None:
    back(kernel)
    assert kernel.run("import atexit; atexit.register(lambda: os.write(1, b'bye'))").status == "ok"
    process = kernel.manager.provisioner.process
    kernel.manager.shutdown_wait_time = 600  # half of it for an end of its own
    kernel.manager.shutdown_kernel()
    assert process.poll() == 0


@pytest.mark.parametrize(("code", "status"), [("os._exit(3)", 3), ("os.kill(os.getpid(), 11)", 139), ("os.kill(2, 9)", 137)])
def test_crash_after_a_rollback(kernels: Kernels, code: str, status: int) -> None:
    kernel = kernels("argv")
    kernel.run("import os\n%isolation checkpoint a")
    back(kernel)
    kernel.send(code)
    assert kernel.manager.provisioner.process.wait(PATIENCE) == status


def test_limits_hold_after_a_rollback(kernels: Kernels) -> None:
    kernel = kernels("argv", "--memory", "400M", "--cell-timeout", "5s")
    kernel.run("x = bytearray(100_000_000)\n%isolation checkpoint a")
    back(kernel)
    back(kernel)
    assert kernel.run("while True: pass").error.startswith("KeyboardInterrupt")
    sent = kernel.send("x = bytearray(1_000_000_000)")
    told = ""
    while "ran out of memory" not in told:
        message = kernel.client.get_iopub_msg(timeout=PATIENCE)
        if message["parent_header"].get("msg_id") == sent:
            told += message["content"].get("text", "")


def test_nothing_is_left_of_a_launcher_that_was_killed(kernel: Kernel) -> None:
    back(kernel)
    inside = kernel.pid
    below = set(descendants(inside))
    assert len(below) >= 3
    os.kill(inside, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while any(os.path.exists(f"/proc/{pid}") for pid in below):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_notebook_with_a_rollback(jupyter: Path, tmp_path: Path) -> None:
    """nbclient waits for reply and "idle" of each cell; both must come, of another process than was asked."""
    codes = ["x = 1", "%isolation checkpoint a", "x = 2", "%isolation rollback a", "print(x)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    NotebookClient(notebook, kernel_name="argv", timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert notebook.cells[-1].outputs[0].text == "1\n"
    assert notebook.cells[3].outputs[0].text == "back at checkpoint a\n"


def test_encrypted_channels_come_back(kernels: Kernels) -> None:
    kernel = kernels("argv", encryption="required")
    kernel.run("x = 1\n%isolation checkpoint a")
    kernel.run("x = 2")
    back(kernel)
    assert kernel.value("x") == "1"


def in_subshell(kernel: Kernel, subshell: str, code: str) -> str:
    message = kernel.client.session.msg("execute_request", {
        "code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False,
    })  # fmt: skip
    message["header"]["subshell_id"] = subshell
    kernel.client.shell_channel.send(message)
    return str(message["header"]["msg_id"])


def test_subshells(one: Kernel) -> None:
    """They are there again, by the same names: JupyterLab has one for its widgets."""
    first = one.control("create_subshell_request", {})["subshell_id"]
    assert one.run("x = 1\n%isolation checkpoint a").status == "ok"
    second = one.control("create_subshell_request", {})["subshell_id"]
    assert "a subshell at work" in one.collect(in_subshell(one, first, "%isolation checkpoint b")).error
    for _ in range(2):
        one.run("x = 2")
        assert one.run("%isolation checkpoint later").status == "ok"
        assert one.collect(in_subshell(one, first, "%isolation rollback a")).text == "back at checkpoint a\n"
        assert one.value("x") == "1"
        assert sorted(one.control("list_subshell_request", {})["subshell_id"]) == sorted([first, second])
        for name in (first, second):
            assert one.collect(
                in_subshell(one, name, "import threading; print(threading.current_thread().name, x)")
            ).text == (f"subshell-{name} 1\n")
    assert one.control("delete_subshell_request", {"subshell_id": first})["status"] == "ok"


def test_the_working_directory_goes_back(one: Kernel) -> None:
    one.run("import os; os.mkdir('below'); os.chdir('below'); here = os.getcwd()\n%isolation checkpoint a")
    assert one.value("os.getcwd() == here and open('new', 'w').write('1')") == "1"
    one.run("os.chdir('/tmp')")
    back(one)
    assert one.value("(os.getcwd() == here, os.listdir())") == "(True, [])"


def test_without_the_supervisor_s_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor ends as the kernel does: here one that was named by the pipe, after another."""
    pipe, its_end = os.pipe()
    middle = os.fork()
    if middle == 0:
        first, second = os.fork(), os.fork()
        if first == 0 or second == 0:
            os._exit(7 if first == 0 else 5)
        os.write(its_end, second.to_bytes(8, "little"))
        supervisor.main(pipe, first)
    _pid, status = os.waitpid(middle, 0)
    assert os.waitstatus_to_exitcode(status) == 5
    os.close(pipe)
    os.close(its_end)


def test_not_refused_for_what_a_frontend_asks_as_it_opens_a_notebook(one: Kernel) -> None:
    """What JupyterLab, with a look at a word or two in the cell; all of it again in the kernel that has come back."""
    assert one.run("x = 1").status == "ok"
    for name in ("a", "b"):
        asked = {"type": "request", "command": "debugInfo", "seq": 1, "arguments": {}}
        assert one.control("debug_request", asked)["body"]["isStarted"] is False
        assert one.control("kernel_info_request", {})["status"] == "ok"
        assert one.control("usage_request", {})["kernel_cpu"] >= 0
        assert one.control("list_subshell_request", {})["status"] == "ok"
        assert one.control("create_subshell_request", {})["status"] == "ok"
        client = one.client
        requests = [client.comm_info(), client.kernel_info(), client.complete("impo", 4), client.inspect("x", 1)]
        requests += [client.inspect("print", 5, 1), client.is_complete("x ="), client.history()]
        for number in requests:
            assert client.get_shell_msg(timeout=PATIENCE)["parent_header"]["msg_id"] == number
        reply = one.run(f"%isolation checkpoint {name}")
        assert reply.status == "ok", reply.error
        one.run("x = 2")
        back(one, name)
        assert one.value("x") == "1"


def test_refused_once_the_debugger_was_used(one: Kernel) -> None:
    one.control(
        "debug_request",
        {"type": "request", "command": "initialize", "seq": 1, "arguments": {"clientID": "t", "adapterID": ""}},
    )
    assert "the debugger, which has been used" in one.run("%isolation checkpoint a").error
    assert one.value("6*7") == "42"
