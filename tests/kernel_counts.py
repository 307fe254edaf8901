"""Says at the end of a test session how many cases ran the Triton kernels, and where."""

from __future__ import annotations

from collections import Counter

import pytest
import torch


@pytest.fixture
def kernel_case(request: pytest.FixtureRequest) -> str:
    """Marks the test as one that runs kernels; the device that they run on here."""
    pytest.importorskip("triton")
    on_cuda = torch.cuda.is_available()
    # Properties come back from the processes that tests are shared out to.
    request.node.user_properties.append(("kernels", "on CUDA" if on_cuda else "interpreted"))
    return "cuda" if on_cuda else "cpu"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    counts = Counter(value for report in ran for name, value in report.user_properties if name == "kernels")
    terminalreporter.write_line(
        f"Triton kernels: {counts['interpreted']} cases ran interpreted, {counts['on CUDA']} on CUDA"
    )
