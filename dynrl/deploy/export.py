"""An exported routed model is a program of torch.export or ONNX that needs no dynrl."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynrl.files import check_folder, write_aside

if TYPE_CHECKING:
    from dynrl.deploy.routed import RoutedModel


def export(model: RoutedModel, path: str | Path) -> None:
    """Write the walk at the present price, router included, as a program for batches of any size.

    A *.pt2 file is a torch.export program: `torch.export.load(path).module()(inputs)` needs torch alone. A *.onnx file
    is for onnxruntime and others; writing it needs the packages onnx and onnxscript. There, the input has its name in
    the network's own `forward` (`inputs` in our families), and the output is called `outputs`. These programs skip
    computation just like the model.

    Raises:
        ValueError: the file has another suffix, or its folder is not writable; the family's choices set sizes that
            torch.export cannot express (`Backbone.exports`); packages are missing; or torch cannot write the network.
            Then nothing is written.
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx") or path.is_dir():
        raise ValueError(f"expected a file *.pt2 (torch.export) or *.onnx (ONNX) to write, got {path}")
    check_folder(path.parent)
    if not model.backbone.exports or model.price_range is None:
        why = model.backbone.why and f"{model.backbone.why}, so it runs as it is, which no program holds"
        if model.price_range is None:
            why = "its policy was not learned"
        raise ValueError(
            f"a {type(model.backbone).__name__} with a {type(model.policy).__name__} cannot be exported: "
            f"{why or 'its choices set sizes, which programs cannot carry'}; use the plugged model in Python"
        )
    missing = [name for name in ("onnx", "onnxscript") if not find_spec(name)] if path.suffix == ".onnx" else []
    if missing:
        raise ValueError(f"to write {path} takes {' and '.join(missing)}: pip install onnx onnxscript")
    weights = next(model.backbone.parameters())
    example = model.backbone.form.example(4, weights)
    batch = torch.export.Dim("batch", min=2)  # torch takes programs for two rows or more to be right for one, too
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # the router's transposed weights
        warnings.filterwarnings("ignore", ".*LeafSpec.*")  # torch warns about its own code when it copies the program
        try:
            with (
                torch.no_grad(),
                torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
                redirect_stderr(io.StringIO()),  # torch prints all that it has traced before it fails
            ):
                program = torch.export.export(_Walking(model), (example,), dynamic_shapes=({0: batch},))
            content = _as_onnx(program, model.backbone.input_name) if path.suffix == ".onnx" else _as_pt2(program)
        except Exception as error:  # torch's tracers may raise anything on a user's network
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"torch cannot write this network as {path.name}, so nothing is written: {said}"
            ) from error
    with write_aside(path) as aside:
        aside.write_bytes(content)


class _Walking(nn.Module):
    """This module is what is exported: it neither checks values nor records routes."""

    def __init__(self, model: RoutedModel) -> None:
        super().__init__()
        self.model, self._chooser = model, model.chooser  # made before tracing: no traced tables may stay in the model

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.model.backbone.run(inputs, self._chooser).outputs
        assert outputs is not None
        return outputs


def _as_pt2(program: torch.export.ExportedProgram) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def _as_onnx(program: torch.export.ExportedProgram, input_name: str) -> bytes:
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.ERROR)  # hides needless warnings on torchvision's missing ops and empty attributes
        converted = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[input_name], output_names=["outputs"]
        )
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
    assert converted is not None
    content: bytes = converted.model_proto.SerializeToString()
    return content
