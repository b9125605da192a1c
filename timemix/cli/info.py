"""The command-line verb info: show this machine, and the size of a model before training."""

import json
import platform
from dataclasses import dataclass, field
from typing import Any

from timemix._version import __version__
from timemix.cli.options import PresetName, first_parse, parse, print_report
from timemix.config.run import TrainConfig
from timemix.models.config import ModelConfig


@dataclass(frozen=True)
class InfoArguments:
    """Show versions and devices, and with a preset or an option also the parameters, FLOPs and memory of a model.

    Examples:
        timemix info
        timemix info seed --model.arch llama --model.layers 12
    """

    preset: PresetName = None
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    json: bool = False
    """Output as one JSON object on stdout."""


def info(arguments: list[str]) -> int:
    choice = first_parse(arguments)
    config = choice.preset_config()
    parsed = parse(InfoArguments, arguments, "info", InfoArguments(model=config.model, train=config.train), choice)
    report: dict[str, Any] = describe_machine()
    if set(arguments) - {"--json", "--no-json"}:
        report |= describe_model(parsed.model, parsed.train)
    if parsed.json:
        print(json.dumps(report))
        return 0
    print_report(report)
    return 0


def describe_machine() -> dict[str, Any]:
    """Return the versions, and the device and precision that `auto` chooses, with the reasons."""
    import torch

    from timemix.runtime.device import choose_device, choose_precision

    device, device_reason = choose_device("auto")
    precision, precision_reason = choose_precision("auto", device)
    return {
        "timemix": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": f"{device} ({device_reason})",
        "precision": f"{precision} ({precision_reason})",
    }


def describe_model(model: ModelConfig, train: TrainConfig) -> dict[str, Any]:
    """Return numbers of parameters by part and by architecture, FLOPs per token, and memory of training."""
    from timemix.models.language_model import block_class
    from timemix.models.registry import like_size_of, list_architectures
    from timemix.models.size import count_parameters, flops_per_token
    from timemix.runtime.device import choose_device, choose_precision
    from timemix.training.memory import training_memory

    device, _ = choose_device(train.device)
    precision, _ = choose_precision(train.precision, device)
    report: dict[str, Any] = {
        "arch": model.arch,
        "size": model.size_words(),
        **block_class(model).forms(model, precision, device),
    }
    report["parameters"] = count_parameters(model)
    report["parameters_by_arch"] = {
        arch: count_parameters(like_size_of(model, arch))["total"] for arch in list_architectures()
    }
    flops = flops_per_token(model)
    report["flops_per_token"] = {"forward": flops, "training": 3 * flops}
    report["training_memory_mib"] = training_memory(model, train, precision) // 2**20
    report["batch_size"] = train.batch_size // train.accumulation
    return report
