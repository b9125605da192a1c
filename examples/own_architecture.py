"""Define an architecture in one file, train it, and compare it with rwkv1, in under a minute on two cores.

The architecture `decay` replaces attention by a mean of the past. Each head h has a learned decay a_h in (0, 1):

    m_t = (1 - a_h) * sum over u <= t of a_h^(t-u) v_u        out_t = W_o (sigmoid(g_t) * m_t)

Training computes all positions at once, by a matrix of decays. Generation needs only the newest mean, because
m_t = a_h m_(t-1) + (1 - a_h) v_t. Therefore the state has a constant size, and the context has no end.

    python examples/own_architecture.py
"""

import argparse
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import timemix
from timemix.models.config import HeadsConfig
from timemix.models.layers.block import Block, Kept, Model, Tensors
from timemix.models.layers.initial import set_weights
from timemix.models.layers.linear import Linear


# 1. Settings. HeadsConfig has the usual settings: layers, channels, heads, ctx_len. Add your own settings.
@dataclass(frozen=True)
class DecayConfig(HeadsConfig):
    """Architecture and size of `decay`."""

    arch: str = "decay"
    """Architecture, on which the other options of the model depend."""
    ffn_ratio: float = 4.0
    """Hidden size of the feed-forward sublayer, as a multiple of channels."""


# 2. The mixer: the sublayer that moves information between positions.
class DecayMixer(nn.Module):
    def __init__(self, config: DecayConfig) -> None:
        super().__init__()
        self.heads, self.head_size = config.heads, config.head_size
        self.value = Linear(config.channels, config.channels)
        self.gate = Linear(config.channels, config.channels)
        self.output = Linear(config.channels, config.channels)
        # The decay sigmoid(0) = 0.5 forgets at once. The decay sigmoid(4) = 0.98 remembers about 50 tokens.
        self.decay = nn.Parameter(torch.linspace(0, 4, config.heads))

    def forward(self, x: Tensor, state: Tensors | None, lengths: Tensor | None) -> tuple[Tensor, Tensors | None]:
        B, T, C = x.shape
        # (B, T, C) -> (B, H, T, N)
        v = self.value(x).view(B, T, self.heads, self.head_size).transpose(1, 2)
        a = torch.sigmoid(self.decay)[:, None, None]
        time = torch.arange(T, device=x.device)
        lag = time[:, None] - time
        # (H, T, T): the weight of source u for target t, 0 for the future.
        weights = torch.where(lag >= 0, (1 - a) * a ** lag.clamp(min=0), 0)
        mean = weights @ v
        if state is not None:
            # The mean of earlier tokens decays once per token: (H, T, 1) * (B, H, 1, N).
            mean = mean + a ** (time[:, None] + 1) * state["mean"][:, :, None]
            # Rows may be padded: only the first `lengths` tokens of each row belong to the state.
            last = torch.full((B,), T, device=x.device) if lengths is None else lengths
            state = {"mean": mean[torch.arange(B, device=x.device), :, last - 1]}
        # (B, H, T, N) -> (B, T, C)
        y = mean.transpose(1, 2).reshape(B, T, C)
        return self.output(torch.sigmoid(self.gate(x)) * y), state


# 3. The block: one layer of the model, with the facts that training needs.
class DecayBlock(Block):
    def __init__(self, config: DecayConfig, layer: int) -> None:
        super().__init__(config, layer)
        hidden = int(config.ffn_ratio * config.channels)
        self.mixer_norm, self.ffn_norm = nn.LayerNorm(config.channels), nn.LayerNorm(config.channels)
        self.mixer = DecayMixer(config)
        self.ffn = nn.Sequential(Linear(config.channels, hidden), nn.GELU(), Linear(hidden, config.channels))

    def init_state(self, batch_size: int) -> Tensors:
        return {"mean": self.mixer.decay.new_zeros(batch_size, self.mixer.heads, self.mixer.head_size)}

    def forward(
        self,
        x: Tensor,
        state: Tensors | None = None,
        carry: Tensor | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensors | None, Tensor | None]:
        y, state = self.mixer(self.mixer_norm(x), state, lengths)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), state, carry

    @classmethod
    def set_initial_values(cls, model: Model) -> None:
        set_weights(model, lambda name, module: nn.init.normal_(module.weight, std=0.05))

    @classmethod
    def kept(cls, config: Any, rows: int) -> Kept:
        # Count of the numbers that a training step stores. timemix estimates the memory of a step from this count.
        hidden = int(config.ffn_ratio * config.channels)
        matrices = 3 * config.layers * config.heads * config.ctx_len**2
        return Kept(12 * config.channels + 2 * hidden, 5 * config.channels + hidden, matrices)


# 4. Registration: from here on, every function of timemix knows `decay` by its name.
timemix.register_architecture(
    timemix.Architecture(
        "decay", DecayConfig, f"{__name__}:DecayBlock", 2026, "purple", "a decaying mean of the past", bounded=False
    )
)


def check_state() -> None:
    """Check that the logits of a whole context equal the logits computed token by token."""
    model = timemix.build_model("decay", vocab_size=50, layers=2, channels=32, ctx_len=16)
    tokens = torch.randint(50, (3, 16))
    with torch.no_grad():
        whole, _ = model(tokens)
        state, steps = model.init_state(3), []
        for t in range(16):
            logits, state = model(tokens[:, t : t + 1], state)
            steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    print(
        f"token by token, the logits are those of the whole context; the state of a text has {state.nbytes // 3} bytes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Define an architecture, train it, and compare it with rwkv1.")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (default: 200)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each architecture (default: 2)")
    options = parser.parse_args()
    check_state()

    # The preset gives both architectures the same layers and channels. The larger ffn_ratio of `decay` makes the
    # numbers of parameters equal.
    models: dict[str, dict[str, Any]] = {"rwkv1": {"arch": "rwkv1"}, "decay": {"arch": "decay", "ffn_ratio": 4.8}}
    losses: dict[str, list[float]] = {"rwkv1": [], "decay": []}
    with tempfile.TemporaryDirectory() as folder:
        # Runs with equal seeds train on the same batches, so each pair of runs differs only in the architecture.
        for seed in range(1, options.seeds + 1):
            for arch, found in losses.items():
                train = {"steps": options.steps, "seed": seed}
                run = timemix.train("cpu-small", f"{folder}/{arch}-{seed}", model=models[arch], train=train)
                found.append(timemix.evaluate(run).nats_per_token)
                parameters = sum(p.numel() for p in run.model.parameters())
                print(
                    f"{arch}, seed {seed}: {parameters:,} parameters, held-out loss {found[-1]:.3f} nats per character"
                )
    differences = [b - a for a, b in zip(losses["rwkv1"], losses["decay"], strict=True)]
    print(f"decay minus rwkv1: {', '.join(f'{each:+.3f}' for each in differences)} (below 0: decay learns better)")

    # `run` is the last run, of `decay`. Its model generates text like any other model.
    print(f"\ndecay generates:\n{timemix.generate(run, 'The ', tokens=200, sampler=timemix.Sampler(top_a=0.02))[0]}")


if __name__ == "__main__":
    main()
