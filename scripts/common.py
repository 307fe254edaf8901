"""The verbs share how they set the number of threads."""

from __future__ import annotations

import os

from dynrl.schema import MOST_THREADS, check_count


def use_threads(count: int | None) -> None:
    """Let torch use `count` threads; with None, as many as OMP_NUM_THREADS says, or else one a core.

    More threads than cores are free make training many times slower.
    """
    import torch

    if count is not None:
        check_count("--threads", count, 1, MOST_THREADS)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count or "OMP_NUM_THREADS" not in os.environ:  # which torch has heeded already
        torch.set_num_threads(count or cores)
