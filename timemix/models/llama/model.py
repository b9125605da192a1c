"""Llama (arXiv 2302.13971), the usual attention baseline of today.

    x = x + attention(RMSNorm(x)),   x = x + down(silu(gate(RMSNorm(x))) * up(RMSNorm(x)))

Rotary positions cover the whole head. There may be fewer key and value heads than query heads (arXiv 2305.13245). The
model has no biases. Logits equal those of LlamaForCausalLM of the `transformers` library (tests/models/test_llama.py).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.models.layers.block import Block, Kept, Model, Tensors
from timemix.models.layers.initial import normal, set_weights
from timemix.models.layers.linear import Linear, to_product_dtype
from timemix.models.layers.rotary import rotary
from timemix.models.llama.config import LlamaConfig
from timemix.ops.common.history import append, lags, lags_in_documents, positions_read
from timemix.ops.common.spread import broadcast_parameter


class RMSNorm(nn.RMSNorm):
    """RMSNorm over channels (arXiv 1910.07467): weight * x / sqrt(mean(x^2) + eps), in at least float32.

    PyTorch's kernel sums the gradient of the weight even in compiled code (`ops.common.spread`), so compilation does
    not change the order of the sum.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, T, C)."""
        if not torch.compiler.is_compiling():
            return super().forward(x)
        y = F.rms_norm(x, self.normalized_shape, eps=self.eps)
        return y * broadcast_parameter(self.weight, y)


class GroupedAttention(nn.Module):
    """Causal attention with rotary positions, computed by PyTorch's fused kernel.

    Query heads g G to g G + G - 1 use key and value head g, with G = heads / kv_heads.
    The state holds the rotated keys and the values of every past position, each of shape (B, kv_heads, ctx_len, N).
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        C = config.channels
        self.query = Linear(C, C, bias=False)
        self.key = Linear(C, C // config.groups, bias=False)
        self.value = Linear(C, C // config.groups, bias=False)
        self.output = Linear(C, C, bias=False)

    def init_state(self, batch_size: int) -> Tensors:
        """Create the state before the first token, for B rows."""
        config = self.config
        shape = (batch_size, config.heads // config.groups, config.ctx_len, config.head_size)
        weight = self.key.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return {name: weight.new_zeros(shape, dtype=dtype) for name in ("keys", "values")}

    def forward(
        self,
        x: Tensor,
        state: Tensors | None,
        position: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensors | None]:
        """Map x (B, T, C) to (B, T, C), and return the next state. `Block.forward` documents the arguments."""
        config = self.config
        B, T, C = x.shape
        # (B, T, C) -> (B, H, T, N), where H is kv_heads for keys and values.
        q, k, v = (
            linear(x).unflatten(2, (-1, config.head_size)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        target = torch.arange(T, device=x.device)
        if position is not None:
            # Rows may be at different positions, so the targets are (B, 1, T).
            target = position[:, None, None] + target
        q, k = (rotary(each, target, config.rotary_base, config.head_size) for each in (q, k))
        seen = None if resets is None else (lags_in_documents(resets) >= 0)[:, None]
        if state is not None and position is not None:
            U = positions_read(position, T, config.ctx_len)
            keys = append(state["keys"], k, position, lengths)
            values = append(state["values"], v, position, lengths)
            state = {"keys": keys, "values": values}
            k, v = keys[:, :, :U].to(q.dtype), values[:, :, :U].to(q.dtype)
            # (B, T, U) -> (B, 1, T, U)
            seen = (lags(position, T, U) >= 0)[:, None]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=config.groups > 1
        )
        # (B, H, T, N) -> (B, T, C)
        return self.output(y.transpose(1, 2).reshape(B, T, C)), state


class Swiglu(nn.Module):
    """The gated feed-forward sublayer down(silu(gate(x)) * up(x)) of arXiv 2002.05202."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        C, hidden = config.channels, config.ffn_hidden
        self.gate = Linear(C, hidden, bias=False)
        self.up = Linear(C, hidden, bias=False)
        self.down = Linear(hidden, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, T, C)."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class LlamaBlock(Block):
    """A block of attention, then SwiGLU, with RMSNorm before each sublayer."""

    takes_resets = True

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.mixer_norm = RMSNorm(config.channels, config.norm_eps)
        self.ffn_norm = RMSNorm(config.channels, config.norm_eps)
        self.mixer = GroupedAttention(config)
        self.ffn = Swiglu(config)
        self.dropout = nn.Dropout(config.dropout)

    def init_state(self, batch_size: int) -> Tensors:
        return self.mixer.init_state(batch_size)

    def forward(
        self,
        x: Tensor,
        state: Tensors | None = None,
        carry: Tensor | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensors | None, Tensor | None]:
        y, state = self.mixer(to_product_dtype(self.mixer_norm(x)), state, position, lengths, resets)
        x = x + self.dropout(y).to(x.dtype)
        y = self.ffn(to_product_dtype(self.ffn_norm(x)))
        return x + self.dropout(y).to(x.dtype), state, carry

    @classmethod
    def final_norm(cls, config: LlamaConfig) -> nn.Module:
        return RMSNorm(config.channels, config.norm_eps)

    @classmethod
    def set_initial_values(cls, model: Model) -> None:
        """Draw every weight from normal(0, initial_std), except the weights of norms, which are one."""
        set_weights(model, normal(model.config.initial_std))

    @classmethod
    def mixing_flops(cls, config: LlamaConfig) -> int:
        """Count the operations of the query-key products and the weight-value products, over whole T x T matrices."""
        return config.layers * 2 * config.channels * 2 * config.ctx_len

    @classmethod
    def kept(cls, config: LlamaConfig, rows: int) -> Kept:
        C, hidden, shared = config.channels, config.ffn_hidden, config.channels // config.groups
        return Kept(11 * C + 2 * shared + 4 * hidden, 4 * C + 2 * shared + 2 * hidden)

    def projections(self) -> dict[tuple[str, str], nn.Linear]:
        mixer, ffn = self.mixer, self.ffn
        return {
            ("mixer", "query"): mixer.query,
            ("mixer", "key"): mixer.key,
            ("mixer", "value"): mixer.value,
            ("ffn", "gate"): ffn.gate,
            ("ffn", "up"): ffn.up,
        }
