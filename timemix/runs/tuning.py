"""Runs that train few parameters beside the frozen weights of another run: a state, or low-rank terms (LoRA).

The checkpoints of such a run hold only the trained parameters. `RunConfig.start` names the checkpoint of the frozen
weights, and training.json holds the hash of the frozen model.
"""

import torch
from torch import Tensor

from timemix.config.run import TrainConfig
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.models.layers.lora import add_lora
from timemix.models.learned_state import LearnedState


def prepare(model: LanguageModel, train: TrainConfig) -> None:
    """Freeze the weights of a model and add the parameters that `train.tune` trains; "all" changes nothing.

    Args:
        model: The model, which may be on the "meta" device.
        train: Settings of training.

    Raises:
        InvalidValue: The model has no recurrent state, or `train.lora_modules` matches no linear map.
    """
    if train.tune == "all":
        return
    model.requires_grad_(False)
    if train.tune == "state":
        model.learned_state = LearnedState(model.blocks)
    else:
        add_lora(model.blocks, train.lora_ranks, train.lora_alpha)


def trained(model: LanguageModel) -> dict[str, Tensor]:
    """Return the tensors of a model by name without the frozen parameters: the content of a checkpoint."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: x for name, x in model.state_dict().items() if name not in frozen}


def frozen_weights(model: LanguageModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names that they have in a model of `prepare`.

    Args:
        model: The model.
        weights: Weights of the model before `prepare`. They may include a learned state.

    Returns:
        Weights by name, without trained parameters that `weights` lacks.
    """
    names = {
        name: f"{name.removesuffix('.base')}.weight" if name.endswith(".base") else name for name in model.state_dict()
    }
    return {name: weights[theirs] for name, theirs in names.items() if theirs in weights}


def tuned_parameters(config: ModelConfig, train: TrainConfig) -> int:
    """Count the numbers that a run trains.

    Args:
        config: Settings of the model.
        train: Settings of training.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
        prepare(model, train)
    return sum(x.numel() for x in trained(model).values())
