"""Export of a trained model to ONNX: the step of one token, with the state as inputs and outputs."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timemix.errors import InvalidValue, Unavailable
from timemix.interop.export import refuse_learned_state
from timemix.models.language_model import LanguageModel
from timemix.models.registry import find_architecture, list_architectures
from timemix.models.state import State
from timemix.runs.load import load
from timemix.storage.files import check_name, new_folder, refuse_existing

PROGRAM = "model.onnx"
"""Name of the file with the step, in the folder of an export."""

LARGEST = 2**31 - 2**20
"""Largest number of bytes of the weights. A file of protobuf, the container of ONNX, has less than 2 GiB."""

_MOST_ROWS = 2**16


def export_onnx(run: Path, out: Path, *, checkpoint: str | int = "best") -> Path:
    """Export the step of one token of a trained model in float32, for any number of rows B.

    Inputs of the step are `token` (B,) int64, `position` (B,) int64, and the tensors `state.LAYER.NAME` of the state
    before the token. Outputs are `logits` (B, V), and the state after the token, with the same names after `next.`. At
    position 0, all tensors of the state are zeros.

    Args:
        run: Run folder, or a checkpoint folder.
        out: New folder for `PROGRAM` and for tokenizer.json.
        checkpoint: "best" (lowest validation loss), "newest", or a step. `checkpoint` has no effect if `run` is a
            checkpoint folder.

    Returns:
        The checkpoint folder that was exported.

    Raises:
        AlreadyExists: `out` exists.
        InvalidValue: `out` has the name of a file, the architecture has no state of constant size, or the model is too
            large.
        FileError: The checkpoint is missing or damaged.
        CannotWrite: The folder cannot be written.
        Unavailable: The packages onnx and onnxscript are not installed.
    """
    check_name(out)
    if out.suffix == ".onnx":
        raise InvalidValue(
            f"{out} is the name of a file, but the export is a folder; give a folder, such as {out.with_suffix('')}"
        )
    refuse_existing(out)
    library = _library()
    loaded = load(run, checkpoint=checkpoint)
    refuse_learned_state(loaded.config, loaded.folder)
    _check(loaded.model)
    with new_folder(out) as temporary:
        (temporary / "tokenizer.json").write_text(loaded.tokenizer.to_json(), encoding="utf-8")
        program = step_program(loaded.model)
        library.helper.set_model_props(program, {"timemix.architecture": loaded.config.model.arch})
        (temporary / PROGRAM).write_bytes(program.SerializeToString())
    return loaded.folder


def _library() -> Any:
    """Import the package onnx.

    Raises:
        Unavailable: The package onnx, or onnxscript, which the exporter of PyTorch needs, is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Unavailable(
            "the packages onnx and onnxscript are not installed; run: pip install 'timemix[onnx]'"
        ) from error
    return onnx


def _check(model: LanguageModel) -> None:
    """Raise InvalidValue if the step of a model does not fit in an ONNX file."""
    arch = model.config.arch
    entry = find_architecture(arch)
    if entry.bounded and entry.recurrent is not None:
        raise InvalidValue(
            f"a model of {arch} has no state of constant size, which a step in ONNX needs; convert the model with"
            " timemix convert, and export the new model"
        )
    if entry.bounded:
        raise InvalidValue(
            f"a model of {arch} has no state of constant size, which a step in ONNX needs; export a model of"
            f" {', '.join(list_architectures(bounded=False))}"
        )
    size = 4 * sum(p.numel() for p in model.parameters())
    if size > LARGEST:
        raise InvalidValue(
            f"the weights have {size:,} bytes in float32, more than the {LARGEST:,} bytes of an ONNX file; export a"
            " smaller model"
        )


class _Step(nn.Module):
    """The step of one token, with the tensors of the state in a list.

    The exported graph starts rows at position 0 from the state before the first token, which is not zero in all
    architectures.

    Args:
        model: The model, in eval mode. Its embedding is replaced, because ONNX has no operator of timemix.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        model.add_module("embedding", nn.Embedding.from_pretrained(model.embedding.weight))
        self.model = model
        tensors = {(i, name): x for i, layer in enumerate(model.init_state(1).layers) for name, x in layer.items()}
        self.names = list(tensors)
        self.starts = {name: x for name, x in tensors.items() if x.any()}

    def forward(self, token: Tensor, position: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the logits (B, V), the next position (B,) and the next tensors of the state."""
        layers: list[dict[str, Tensor]] = [{} for _ in self.model.blocks]
        for (i, name), x in zip(self.names, tensors, strict=True):
            if (start := self.starts.get((i, name))) is not None:
                x = torch.where((position == 0).view(-1, *[1] * (x.ndim - 1)), start, x)
            layers[i][name] = x
        logits, state = self.model(token[:, None], State(position, layers), logits="last")
        assert state is not None
        return logits, state.position, [state.layers[i][name] for i, name in self.names]


def step_program(model: LanguageModel) -> Any:
    """Return the step of one token as a program of ONNX (`onnx.ModelProto`).

    Args:
        model: The model, in eval mode. The function changes the model to float32, and replaces its embedding.

    Raises:
        InvalidValue: PyTorch cannot export the architecture.
    """
    step = _Step(model.float()).eval()
    # With one row, the exporter would fix the number of rows.
    state = model.init_state(2)
    tensors = [state.layers[i][name] for i, name in step.names]
    names = ["position", *(f"{i}.{name}" for i, name in step.names)]
    rows = {0: torch.export.Dim("rows", min=1, max=_MOST_ROWS)}
    try:
        with torch.no_grad(), _silent():
            program = torch.onnx.export(
                step,
                (torch.zeros(2, dtype=torch.int64), state.position, tensors),
                input_names=["token", "position", *(f"state.{name}" for name in names[1:])],
                output_names=["logits", *(f"next.{name}" for name in names)],
                dynamic_shapes=(rows, rows, [rows for _ in tensors]),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise InvalidValue(
            f"PyTorch cannot export a model of {model.config.arch} to ONNX: {_cause(error)}; export another model"
        ) from error
    assert program is not None
    return _without_paths(program.model_proto)


def _cause(error: BaseException) -> str:
    """Return the first line of the first error in a chain. The later errors of the exporter contain advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0]


def _without_paths(program: Any) -> Any:
    """Remove what the exporter notes of the source code, such as the paths of files on this machine."""
    graph = program.graph
    for each in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del each.metadata_props[:]
    return program


@contextmanager
def _silent() -> Iterator[None]:
    """Hide the warnings of PyTorch's exporter, which are about its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
