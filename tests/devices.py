"""A guard for kernels: nothing may make the host wait for the device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostSync(TorchDispatchMode):
    """Raises where the host would wait for a value of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        to_host = (
            name == "aten::_to_copy" and args[0].is_cuda and torch.device(kwargs.get("device", "cuda")).type == "cpu"
        )
        if to_host or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::item"):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)
