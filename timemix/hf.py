"""Classes with which the package transformers opens exported models.

    import timemix.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("exported")
    tokenizer = AutoTokenizer.from_pretrained("exported")

The import registers the classes. A folder of `timemix export RUN --to hf` also opens without the import, with
`trust_remote_code=True`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from timemix.errors import InvalidValue, Unavailable
from timemix.interop.model_folder import AUTO_MAP, MODEL_TYPE, write_stub
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.models.registry import DEFAULT_ARCHITECTURE, model_config
from timemix.models.state import State

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )
    from transformers.utils import ModelOutput
except ImportError as error:
    raise Unavailable("the package transformers is not installed; run: pip install 'timemix[hf]'") from error

IGNORED = -100
"""Label of a position without a target."""


class TimemixConfig(PreTrainedConfig):
    """Settings of an exported model, in the config.json of transformers."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["state"]

    timemix: dict[str, Any] | None = None
    """Settings of the model by name, as in the table `model` of config.toml."""
    vocab_size: int = 256
    """Number V of rows of the embedding and the head."""
    hidden_size: int = 128
    """Width of the model."""
    num_hidden_layers: int = 4
    """Number of blocks."""
    max_position_embeddings: int | None = None
    """Largest number of tokens in a context; None if the context has no end."""
    outside_token_id: int = 0
    """Token that the model reads in place of ids from V on. `<|endoftext|>` and `<|pad|>` have such ids if the
    vocabulary of the model lacks these tokens."""
    use_cache: bool = True
    """Whether `generate` passes the state from token to token."""
    tie_word_embeddings: bool = False
    """False: the head has its own weights."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**(kwargs | {"auto_map": dict(AUTO_MAP)}))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing, so that `save_pretrained` does not copy the code of timemix into the folder."""

    def settings(self) -> ModelConfig:
        """Return the settings of the model in timemix.

        Raises:
            InvalidValue: A setting is unknown or out of its range.
        """
        fields: dict[str, Any] = {"arch": DEFAULT_ARCHITECTURE} | (self.timemix or {})
        return model_config(**(fields | {"vocab_size": self.vocab_size}))


@dataclass
class TimemixOutput(ModelOutput):
    """Output of `TimemixForCausalLM`.

    Args:
        loss: Mean cross-entropy of the labels in nats, a scalar; None without labels.
        logits: Logits of the next token (B, T, V).
        state: State after the tokens; None without `use_cache`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None


class TimemixForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of timemix as a model of transformers.

    Args:
        config: Settings of the model.

    Raises:
        InvalidValue: A setting is unknown or out of its range.
    """

    config_class = TimemixConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: TimemixConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.settings())
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing, so that `save_pretrained` does not copy the code of timemix into the folder."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: Any) -> None:
        """Keep the initial values, which `LanguageModel` has set."""

    def get_input_embeddings(self) -> Any:
        """Return the embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> Any:
        """Return the head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the head."""
        self.model.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the logits of the next token after each token.

        Args:
            input_ids: Token ids (B, T). Ids from V on are read as `config.outside_token_id`.
            attention_mask: 1 for a token and 0 for padding (B, at least T), of which the last T columns count. Padding
                stands left or right of the tokens of a row. None: no padding.
            state: State that the tokens continue. The call does not change it. None: the tokens begin a text.
            labels: Target of each token (B, T), shifted by the call. The loss ignores -100 and ids from V on.
            use_cache: Whether to return the state. None: only if `state` is given.
            logits_to_keep: Number of last positions with logits, or indices of the positions; 0: all positions.
            return_dict: Whether to return a `TimemixOutput` instead of a tuple. None: as the config sets it.
            **kwargs: Other arguments of the functions of transformers, which the loss gets.

        Returns:
            The loss, the logits and the state.

        Raises:
            InvalidValue: Padding stands between tokens, a row with a state has no token, `input_ids` is missing, or an
                argument is not supported.
            ValueError: The context would have more tokens than `config.max_position_embeddings`.
        """
        _refuse(kwargs)
        if input_ids is None:
            raise InvalidValue("input_ids is missing; pass the ids of the tokens")
        B, T = input_ids.shape
        tokens = torch.where(input_ids < self.config.vocab_size, input_ids, self.config.outside_token_id)
        if state is not None:
            state = state.clone()
        elif use_cache:
            state = self.model.init_state(B)
        begin, lengths = _padding(attention_mask, T, has_state=state is not None)
        self.model.recompute = "all" if self.gradient_checkpointing and self.training else "none"
        if begin is not None:
            tokens = _rolled(tokens, begin)
        x, state = self.model(tokens, state, lengths=lengths, logits=None)
        if begin is not None:
            x = _rolled(x, -begin)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(x[:, keep])
        if labels is not None and begin is not None:
            # The first token of a padded row has no token before it that predicts it.
            labels = labels.scatter(1, begin[:, None], IGNORED)
        loss = None if labels is None else self._loss(logits, labels, **kwargs)
        output = TimemixOutput(loss=loss, logits=logits, state=state if use_cache is not False else None)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        """Return the loss of training, as in `timemix train`."""
        labels = torch.where(labels < self.config.vocab_size, labels, IGNORED)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return self.model.block.training_loss(self.model.config, loss, logits)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        found: dict[str, Any] = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return found | ({"state": outputs.state} if outputs.get("state") is not None else {})

    @staticmethod
    def _reorder_cache(state: State, beam_idx: Tensor) -> State:
        """Return the states of the beams that beam search continues."""
        return state.select(beam_idx)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model, with the file for `trust_remote_code=True`. The arguments are those of transformers."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_stub(Path(save_directory))


_UNSUPPORTED = {
    "inputs_embeds": "pass input_ids",
    "cache": "pass state",
    "past_key_values": "pass state",
    "output_hidden_states": "leave it out",
    "output_attentions": "leave it out",
}
"""Arguments of other models of transformers, with the way out."""


def _refuse(given: dict[str, Any]) -> None:
    for name, way_out in _UNSUPPORTED.items():
        if given.get(name) is not None and given[name] is not False:
            raise InvalidValue(f"{name} is given, but a model of timemix does not support it; {way_out}")


def _padding(mask: Tensor | None, T: int, *, has_state: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the position of the first token of each row (B,) and its number of tokens (B,); None without padding.

    Args:
        mask: 1 for a token and 0 for padding (B, at least T), or None.
        T: Number of columns.
        has_state: Whether the call continues or creates a state, which must not read padding.
    """
    if mask is None:
        return None, None
    if mask.ndim != 2 or mask.shape[1] < T:
        raise InvalidValue(f"attention_mask has the shape {tuple(mask.shape)}; it must be (rows, at least {T})")
    valid = mask[:, mask.shape[1] - T :] != 0
    if bool(valid.all()):
        return None, None
    lengths = valid.sum(1)
    begin = valid.int().argmax(1)
    position = torch.arange(T, device=mask.device)
    if not bool((valid == ((position >= begin[:, None]) & (position < (begin + lengths)[:, None]))).all()):
        raise InvalidValue("attention_mask has padding between tokens; move the padding to one end of the row")
    if has_state and not bool(lengths.all()):
        raise InvalidValue("attention_mask has a row without tokens; leave out this row")
    return begin, lengths


def _rolled(x: Tensor, shift: Tensor) -> Tensor:
    """Move the columns of each row of x (B, T, ...) left by a number of columns of its own (B,), in a circle."""
    B, T = x.shape[:2]
    source = (torch.arange(T, device=x.device) + shift[:, None]) % T
    return x[torch.arange(B, device=x.device)[:, None], source]


AutoConfig.register(MODEL_TYPE, TimemixConfig, exist_ok=True)
AutoModelForCausalLM.register(TimemixConfig, TimemixForCausalLM, exist_ok=True)
AutoTokenizer.register(TimemixConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
