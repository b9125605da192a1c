"""The attention baselines of 2021: rotary attention with GeGLU, and MHA_pro (RWKV-LM 0.01).

    A[t, u] = softmax_u(q[t] . k[u] / sqrt(N)), u <= t                  per head
    y[t]    = sum_u A[t, u] v[u]                                        rotary attention, per head
    y_g[t]  = sum_u (sum_h mix[g, h] A_h[t, u] W_h[t, u]) v_g[u]        MHA_pro, head g

The queries q and keys k are rotated by their positions. Shapes: B rows, T tokens of this call, U past and present
tokens, H heads of size N.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.models.attention.config import ProConfig, RotaryConfig
from timemix.models.config import ShiftedConfig
from timemix.models.layers.activations import ACTIVATIONS
from timemix.models.layers.block import Kept, Model, Tensors
from timemix.models.layers.channel_mix import ChannelMix
from timemix.models.layers.initial import log_decay, normal, orthogonal, scale_outputs, set_weights, table_like
from timemix.models.layers.linear import Linear, joint_linear
from timemix.models.layers.resize import with_ctx_len
from timemix.models.layers.rotary import rotary
from timemix.models.layers.shifted_block import ShiftedBlock
from timemix.models.layers.tables import time_gamma, time_table, times_gamma
from timemix.ops.common.causal import toeplitz
from timemix.ops.common.history import append, lags, lags_in_documents, positions_read, weights_at
from timemix.runtime.distributed import set_whole


def rotated(head_size: int) -> int:
    """Return the number of rotated dimensions of each head: the first half, rounded down to an even number."""
    return head_size // 4 * 2


class RotaryAttention(nn.Module):
    """Causal multi-head attention with rotary positions, computed by PyTorch's fused kernel.

    The state holds the rotated keys and the values of every past position, each of shape (B, H, ctx_len, N).
    """

    def __init__(self, config: RotaryConfig | ProConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary_base = config.rotary_base
        C = config.channels
        self.query = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.output = Linear(C, C)

    def init_state(self, batch_size: int) -> dict[str, Tensor]:
        """Create the state before the first token, for B rows."""
        config = self.config
        shape = (batch_size, config.heads, config.ctx_len, config.head_size)
        weight = self.key.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return {name: weight.new_zeros(shape, dtype=dtype) for name in ("keys", "values")}

    def forward(
        self,
        x: Tensor,
        state: dict[str, Tensor] | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Map x (B, T, C) to (B, T, C), and return the next state. `Block.forward` documents the arguments."""
        B, T, C = x.shape
        # (B, T, C) -> (B, H, T, N)
        q, k, v = (
            linear(x).unflatten(2, (self.config.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        target = torch.arange(T, device=x.device)
        lag = None if resets is None else lags_in_documents(resets)
        if position is not None:
            # Rows may be at different positions, so the targets are (B, 1, T).
            target = position[:, None, None] + target
        turned = rotated(self.config.head_size)
        q = rotary(q, target, self.rotary_base, turned)
        k = rotary(k, target, self.rotary_base, turned)
        if state is not None and position is not None:
            U = positions_read(position, T, self.config.ctx_len)
            keys = append(state["keys"], k, position, lengths)
            values = append(state["values"], v, position, lengths)
            state = {"keys": keys, "values": values}
            k, v = keys[:, :, :U].to(q.dtype), values[:, :, :U].to(q.dtype)
            lag = lags(position, T, U)
        y = self.attend(q, k, v, lag)
        # (B, H, T, N) -> (B, T, C)
        y = self.output(y.transpose(1, 2).reshape(B, T, C))
        return self.scale(y, position), state

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lag: Tensor | None) -> Tensor:
        """Compute the attention of each target over its past sources.

        Args:
            q: Queries (B, H, T, N).
            k: Keys (B, H, U, N).
            v: Values (B, H, U, N).
            lag: Lag of each source from each target (B, T, U), negative for future sources; None, as in training: lag
                t - u, and U = T. The lag is also negative for sources of another document.

        Returns:
            Outputs (B, H, T, N).
        """
        if lag is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # (B, T, U) -> (B, 1, T, U)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(lag >= 0)[:, None])

    def scale(self, y: Tensor, position: Tensor | None) -> Tensor:
        """Return y (B, T, C) unchanged. `ProAttention` multiplies y by gamma in this method."""
        return y


class ProAttention(RotaryAttention):
    """Attention whose softmax weights are multiplied by W(t, u), then mixed over heads by a matrix.

    As in rwkv1, W(t, u) = f_h(t-u) alpha_h(u) beta_h(t), and the output is multiplied by gamma(t). The mix over heads
    after the softmax is called "talking heads" (arXiv 2003.02436).
    """

    def __init__(self, config: ProConfig) -> None:
        super().__init__(config)
        H = config.heads
        self.f = nn.Parameter(torch.ones(H, config.ctx_len))
        self.alpha = time_table(config, config.alpha)
        self.beta = time_table(config, config.beta)
        self.gamma = time_gamma(config, config.gamma)
        self.head_mix = nn.Parameter(torch.empty(H, H).uniform_(-(H**-0.5), H**-0.5))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lag: Tensor | None) -> Tensor:
        """Compute the attention of each target over its past sources, see `RotaryAttention.attend`."""
        T, U, N = q.shape[2], k.shape[2], q.shape[3]
        # (T, U) or (B, 1, T, U)
        future = torch.ones(T, U, dtype=torch.bool, device=q.device).triu(1) if lag is None else (lag < 0)[:, None]
        scores = (q @ k.transpose(-1, -2) * N**-0.5).masked_fill(future, -torch.inf)
        # (B, H, T, U), times (H, T, T) or (B, H, T, U)
        weights = scores.softmax(-1) * self.W(T, U, lag)
        # Mix heads h into heads g: (B, H, T, U). Then sum over the sources: (B, H, T, U) @ (B, H, U, N).
        return torch.einsum("gh,bhtu->bgtu", self.head_mix, weights).to(v.dtype) @ v

    def W(self, T: int, U: int, lag: Tensor | None) -> Tensor:
        """Return W(t, u), of shape (H, T, T) if `lag` is None, as in training, else (B, H, T, U)."""
        if lag is None:
            W = toeplitz(self.f, T, T)
            target = torch.arange(T, device=W.device)
        else:
            W = weights_at(self.f, lag)
            # The lag from source 0 is the position of the target: (B, T)
            target = lag[:, :, 0].clamp(max=self.config.ctx_len - 1)
        if self.alpha is not None:
            W = W * self.alpha[:, None, :U]
        if self.beta is not None:
            # (H, T) or (H, B, T)
            beta = self.beta[:, target]
            W = W * (beta if lag is None else beta.transpose(0, 1))[..., None]
        result: Tensor = W
        return result

    def scale(self, y: Tensor, position: Tensor | None) -> Tensor:
        """Multiply y (B, T, C) by gamma at each row's positions."""
        return times_gamma(y, self.gamma, position)


class Geglu(nn.Module):
    """The gated feed-forward sublayer output(act(key(x)) * value(x)) of arXiv 2002.05202."""

    def __init__(self, config: ShiftedConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        C, hidden = config.channels, config.ffn_hidden
        self.key = Linear(C, hidden)
        self.value = Linear(C, hidden)
        self.output = Linear(hidden, C)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, T, C)."""
        k, v = joint_linear(x, self.key, self.value)
        result: Tensor = self.output(self.activation(k) * v)
        return result


class RotaryBlock(ShiftedBlock):
    """A block of rotary attention, then GeGLU. If the config has token-shift, token-shift precedes both sublayers."""

    Mixer: ClassVar[type[RotaryAttention]] = RotaryAttention
    Ffn: ClassVar[type[Geglu | ChannelMix]] = Geglu
    takes_resets = True

    @classmethod
    @torch.no_grad()
    def set_initial_values(cls, model: Model) -> None:
        config = model.config
        if config.initial == "original":
            set_weights(model, normal(0.01))
            return
        set_weights(model, orthogonal)
        for layer, block in enumerate(model.blocks):
            scale_outputs(block, layer, zero=True)
            if isinstance(block.mixer, ProAttention):
                f = block.mixer.f
                set_whole(f, table_like(f, log_decay(config.heads, config.ctx_len)).exp())

    @classmethod
    def mixing_flops(cls, config: ShiftedConfig) -> int:
        """Count the operations of the query-key products and the weight-value products, over whole T x T matrices."""
        return config.layers * 2 * config.channels * 2 * config.ctx_len


class ProBlock(RotaryBlock):
    """A block of attention times W with talking heads, then channel-mix."""

    Mixer = ProAttention
    Ffn = ChannelMix
    # W and gamma depend on the position in the window, not in the document.
    takes_resets = False

    @classmethod
    def kept(cls, config: ShiftedConfig, rows: int) -> Kept:
        """Count the numbers that `ShiftedBlock` stores, plus W and three T x T matrices per row for each head."""
        usual = super().kept(config, rows)
        return Kept(
            usual.block, usual.products, (3 * rows + 4) * config.heads * config.ctx_len * config.layers * config.ctx_len
        )

    @classmethod
    def resized(cls, weights: Tensors, config: ShiftedConfig, ctx_len: int) -> Tensors:
        return with_ctx_len(weights, config.ctx_len, ctx_len)
