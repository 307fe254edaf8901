"""Says at the end of a test session how many cases ran the Triton kernels, and where."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

COUNTS = pytest.StashKey[Counter[str]]()


@pytest.fixture
def kernel_case(request: pytest.FixtureRequest) -> str:
    """Counts the test as one that runs kernels; the device that they run on here."""
    pytest.importorskip("triton")
    on_cuda = torch.cuda.is_available()
    request.config.stash.setdefault(COUNTS, Counter())["on CUDA" if on_cuda else "interpreted"] += 1
    return "cuda" if on_cuda else "cpu"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash.get(COUNTS, Counter())
    terminalreporter.write_line(
        f"Triton kernels: {counts['interpreted']} cases ran interpreted, {counts['on CUDA']} on CUDA"
    )
