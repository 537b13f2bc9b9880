"""The project's own tests of kernels, jupyter_kernel_test, as they are for plain ipykernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jupyter_kernel_test
import pytest
from kernel.frontend import PATIENCE

pytestmark = [pytest.mark.once("user"), pytest.mark.usefixtures("jupyter")]


class Samples:
    """Upstream's own, for ipykernel."""

    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    code_page_something = "zip?"
    code_generate_error = "raise"
    code_execute_result = (
        {"code": "1+2+3", "result": "6"},
        {"code": "[n*n for n in range(1, 4)]", "result": "[1, 4, 9]"},
    )
    code_display_data = (
        {"code": "from IPython.display import HTML, display; display(HTML('<b>test</b>'))", "mime": "text/html"},
        {"code": "from IPython.display import Math, display; display(Math('\\\\frac{1}{2}'))", "mime": "text/latex"},
    )
    code_history_pattern = "1?2*"
    supported_history_operations = ("tail", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"
    completion_samples = ({"text": "zi", "matches": {"zip"}},)
    complete_code_samples = ("1", "print('hello, world')", "def f(x):\n  return x*2\n\n\n")
    incomplete_code_samples = ("print('''hello", "def f(x):\n  x*2")
    invalid_code_samples = ("import = 7q",)
    kc: Any

    def setUp(self) -> None:
        """Upstream waits a tenth of a second for the next message, and takes silence as long for its end: on a busy machine
        that is neither."""
        super().setUp()  # type: ignore[misc]
        if "get_shell_msg" not in vars(self.kc):
            next_output, next_reply = self.kc.iopub_channel.get_msg, self.kc.get_shell_msg
            self.kc.iopub_channel.get_msg = lambda timeout=None: next_output(timeout=PATIENCE)
            self.kc.get_shell_msg = lambda timeout=None: next_reply(timeout=PATIENCE)

    def flush_channels(self) -> None:
        """Until the kernel has done something that was asked last: nothing of before is on its way then."""
        asked = self.kc.kernel_info()
        while self.kc.get_shell_msg(timeout=PATIENCE)["parent_header"].get("msg_id") != asked:
            pass
        while True:
            message = self.kc.get_iopub_msg(timeout=PATIENCE)
            if message["parent_header"].get("msg_id") == asked and message["content"].get("execution_state") == "idle":
                return


class TestByArgv(Samples, jupyter_kernel_test.KernelTests):
    kernel_name = "argv"


class TestByProvisioner(Samples, jupyter_kernel_test.KernelTests):
    kernel_name = "provisioner"


class TestWelcomeByArgv(jupyter_kernel_test.IopubWelcomeTests):
    kernel_name = "argv"
    support_iopub_welcome = True


class TestWelcomeByProvisioner(jupyter_kernel_test.IopubWelcomeTests):
    kernel_name = "provisioner"
    support_iopub_welcome = True


def test_both_kernelspecs_are_ours(jupyter: Path) -> None:
    for name in ("argv", "provisioner"):
        assert "isolation_kernel" in (jupyter / f"share/jupyter/kernels/{name}/kernel.json").read_text()
