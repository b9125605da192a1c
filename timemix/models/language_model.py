"""The language model around every architecture: embedding, blocks, head, and the state that it carries."""

from typing import Literal, cast

import torch
from torch import Tensor, nn

from timemix.models.attention.model import Geglu, ProAttention, RotaryAttention
from timemix.models.config import ENDLESS, ModelConfig, Recompute
from timemix.models.layers.channel_mix import ChannelMix
from timemix.models.layers.linear import Embedding, LayerNorm, Linear, product_dtype, to_product_dtype
from timemix.models.layers.recompute import recomputed
from timemix.models.layers.token_shift import TokenShift
from timemix.models.rwkv1.exp_time_mix import ExpTimeMix
from timemix.models.rwkv1.initial import set_initial_values
from timemix.models.rwkv1.time_mix import TimeMix
from timemix.models.state import State
from timemix.ops.common import fused

# mixer and feed-forward half of each architecture
ARCHITECTURES: dict[str, tuple[type[TimeMix | ExpTimeMix | RotaryAttention], type[ChannelMix | Geglu]]] = {
    "rwkv1": (TimeMix, ChannelMix),
    "rwkv1_exp": (ExpTimeMix, ChannelMix),
    "mha_rotary": (RotaryAttention, Geglu),
    "mha_shift": (RotaryAttention, Geglu),
    "mha_pro": (ProAttention, ChannelMix),
}


class Block(nn.Module):
    """x + mixer(shift(norm(x))), then x + ffn(shift(norm(x)))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        mixer, ffn = ARCHITECTURES[config.arch]
        self.mixer_norm = LayerNorm(config.channels)
        self.ffn_norm = LayerNorm(config.channels)
        self.shift = TokenShift(config, layer)
        self.mixer = mixer(config)
        self.ffn = ffn(config)
        self.dropout = nn.Dropout(config.dropout)

    def init_state(self, batch_size: int) -> dict[str, Tensor]:
        state = self.mixer.init_state(batch_size)
        if self.shift.distance:
            rows = self.mixer_norm.weight.new_zeros(batch_size, self.shift.distance, len(self.mixer_norm.weight))
            state |= {"mixer_shift": rows, "ffn_shift": rows.clone()}
        return state

    def forward(
        self,
        x: Tensor,
        state: dict[str, Tensor] | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        old = state or {}
        shifted, mixer_shift = self._shifted(self.mixer_norm, x, old.get("mixer_shift"), lengths)
        y, state = self.mixer(shifted, state, position, lengths)
        x = x + self.dropout(y).to(x.dtype)
        shifted, ffn_shift = self._shifted(self.ffn_norm, x, old.get("ffn_shift"), lengths)
        x = x + self.dropout(self.ffn(shifted)).to(x.dtype)
        if state is not None and mixer_shift is not None and ffn_shift is not None:
            state |= {"mixer_shift": mixer_shift, "ffn_shift": ffn_shift}
        return x, state

    def _shifted(
        self, norm: LayerNorm, x: Tensor, state: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if state is None and x.dtype == torch.float32 and fused.serves(x):
            return fused.norm_shift(x, norm.weight, norm.bias, norm.eps, self.shift.edges, product_dtype(x)), None
        return self.shift(to_product_dtype(norm(x)), state, lengths)


class LanguageModel(nn.Module):
    """Tokens to logits, for every architecture of the config.

    No position embedding; the head has no bias and is not tied to the embedding.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.channels)
        self.blocks = cast(list[Block], nn.ModuleList(Block(config, layer) for layer in range(config.layers)))
        self.norm = LayerNorm(config.channels)
        self.head = Linear(config.channels, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.recompute: Recompute = "none"
        if self.device.type != "meta":
            set_initial_values(self)

    @property
    def max_position(self) -> int | None:
        """Tokens that a context can hold: ctx_len, where the tables (or the key/value cache) end; None: any number."""
        return None if self.config.arch in ENDLESS else self.config.ctx_len

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def init_state(self, batch_size: int) -> State:
        """State before the first token, for `batch_size` rows."""
        position = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        return State(position, [block.init_state(batch_size) for block in self.blocks])

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        logits: Literal["all", "last"] | None = "all",
    ) -> tuple[Tensor, State | None]:
        """Logits of the next token after each of `tokens` (B, T) int64, and the next state.

        Without a state (training) none is built. With one, the tokens continue it: T > 1 is a prefill, T = 1
        a step; the state is consumed. `lengths` (B,), from 1 to T: only the first `lengths` tokens of a row
        count, the rest is padding. `logits`: "all" gives (B, T, V), "last" those after each row's last token
        (B, V), None the hidden rows before the head (B, T, C).

        Raises ValueError when the tokens would pass `max_position`.
        """
        B, T = tokens.shape
        end = T if state is None else int((state.position + (T if lengths is None else lengths)).max())
        if self.max_position is not None and end > self.max_position:
            raise ValueError(f"{end} tokens are more than this model's context of {self.max_position}")
        x = self.dropout(self.embedding(tokens))
        layers = []
        for i, block in enumerate(self.blocks):
            if state is None:
                x = recomputed(block, x, self.recompute)
            else:
                x, layer = block(x, state.layers[i], state.position, lengths)
                layers.append(layer)
        if state is not None:
            state = State(state.position + (T if lengths is None else lengths), layers)
        if logits == "last":
            last = torch.full((B,), T, device=x.device) if lengths is None else lengths
            x = x[torch.arange(B, device=x.device), last - 1]
        x = self.norm(x)
        return (x if logits is None else self.head(x)), state
