"""Start of a run that trains a state or low-rank terms beside the frozen weights of another run (`runs.tuning`)."""

from dataclasses import replace

import torch
from torch import Tensor

from timemix.config.run import RunConfig
from timemix.errors import InvalidValue
from timemix.generation.session import Session, load_session
from timemix.models.hashes import model_hash
from timemix.models.language_model import LanguageModel, evaluating
from timemix.models.state import State
from timemix.runs.load import Loaded
from timemix.runs.tuning import frozen_weights
from timemix.storage.tensors import release
from timemix.training.saving import fill
from timemix.training.trainer import Trainer


def with_frozen(config: RunConfig, start: Loaded | None) -> RunConfig:
    """Check that a run can train the parameters that `train.tune` names.

    Args:
        config: Config of a new run.
        start: The model that the run starts from, or None.

    Returns:
        The config, which names the frozen checkpoint by its absolute path if `train.tune` is not "all".

    Raises:
        InvalidValue: The settings exclude one another, or the model cannot be tuned.
    """
    tune = config.train.tune
    if tune != "state" and start is not None and start.model.learned_state is not None:
        raise InvalidValue(
            f"{start.folder} has a learned state, which train.tune {tune!r} would lose; set train.tune to 'state', or"
            f" start from the weights in {start.config.start}"
        )
    if tune == "all":
        return config
    if start is None:
        raise InvalidValue(f"train.tune is {tune!r}, which needs trained weights; start from a run (--from RUN)")
    weights = start.model.state_dict()
    resized = start.model.block.resized(weights, start.config.model, config.model.ctx_len)
    if tune == "state" and any(x.shape != weights[name].shape for name, x in resized.items()):
        raise InvalidValue(
            f"model.ctx_len={config.model.ctx_len} differs from {start.config.model.ctx_len} in {start.folder}, and"
            f" changes the weights of {config.model.arch}, for which a state is learned; leave model.ctx_len out"
        )
    hash_released(start)
    return replace(config, start=str(start.folder.resolve()))


def first_state(config: RunConfig, start: Loaded | None) -> Session | None:
    """Load the session whose state is the first learned state of a run, or return None if the run names no session.

    Args:
        config: Config of a new run.
        start: The model that the run starts from, or None.

    Raises:
        InvalidValue: `train.tune` is not "state".
        FileError: The file is missing or damaged, is no session file, or belongs to another model.
    """
    if config.start_state is None:
        return None
    if config.train.tune != "state":
        raise InvalidValue(
            f"the state in {config.start_state} needs train.tune 'state', but train.tune is {config.train.tune!r}; set"
            " train.tune to 'state'"
        )
    return None if start is None else load_session(config.start_state, start.model)


def hash_released(start: Loaded) -> None:
    """Compute the hash of a model, which `model_hash` keeps, and release the memory of its mapped weights.

    Called before the memory of a trainer is allocated, it keeps the peak of the memory low.
    """
    model_hash(start.model)
    for weight in _mapped(start, start.model.state_dict()):
        release(weight)


def _mapped(start: Loaded, weights: dict[str, Tensor]) -> list[Tensor]:
    """Return the weights of a model that are mapped from a file. A learned state is a copy."""
    names = (name for name in weights if start.model.is_mapped and not name.startswith("learned_state."))
    return [weights[name] for name in names]


@torch.no_grad()
def fill_start(trainer: Trainer, start: Loaded, session: Session | None = None) -> None:
    """Copy the weights of a trained model into the model of a trainer, whose context length may differ.

    Args:
        trainer: The trainer.
        start: The trained model.
        session: Session of `start` from whose end the learned state of the trainer begins, or None.

    Raises:
        InvalidValue: The architecture cannot learn a state that begins with the state of the session.
    """
    model, old = trainer.model, start.model.state_dict()
    weights = start.model.block.resized(old, start.config.model, model.config.ctx_len)
    if trainer.config.train.tune == "all":
        fill(model, weights.__getitem__)
        return
    own = model.state_dict()
    mapped = {id(weight) for weight in _mapped(start, old)}
    for name, weight in frozen_weights(model, weights).items():
        own[name].copy_(weight)
        # Memory that is not mapped would lose its numbers.
        if id(weight) in mapped:
            release(weight)
    trainer.start_hash = model_hash(start.model)
    if session is not None and model.learned_state is not None:
        model.learned_state.begin_with(_at_its_end(session, model), model.blocks)


def _at_its_end(session: Session, model: LanguageModel) -> State:
    """Return the state after all tokens of a session."""
    state = model.init_state(1)
    for own, saved in zip(state.layers, session.state.layers, strict=True):
        for name, x in own.items():
            x.copy_(saved[name])
    state.position.copy_(session.state.position)
    if session.unread:
        unread = torch.tensor([session.tokens[-session.unread :]], device=model.device)
        with evaluating(model):
            _, state = model(unread, state, logits="last")
    return state
