"""The project's own tests of kernels, jupyter_kernel_test, as they are for plain ipykernel."""

from __future__ import annotations

from pathlib import Path

import jupyter_kernel_test
import pytest

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
