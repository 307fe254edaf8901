"""A guard for kernels: nothing may make the host wait for the device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::_unique2")
MASKS = (torch.bool, torch.uint8)


class NoHostSync(TorchDispatchMode):
    """Raises where the host would wait for a value of the device.

    In inference mode torch hands on calls as they were made (`to`, `is_nonzero`), else what they are made of.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        waits = name in WAITS
        if name in ("aten::to", "aten::_to_copy"):
            places = [
                torch.device(of) for of in (*args[1:], kwargs.get("device")) if isinstance(of, (torch.device, str))
            ]
            waits = args[0].is_cuda and any(place.type == "cpu" for place in places)
        elif name == "aten::index":
            waits = any(index is not None and index.dtype in MASKS for index in args[1])
        if waits:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)
