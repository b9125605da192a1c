"""The blocks of rwkv1 and rwkv1_exp."""

import torch

from timemix.errors import InvalidValue
from timemix.models.config import ShiftedConfig
from timemix.models.layers.block import FIRST_WEIGHT, Kept, Model, Tensors
from timemix.models.layers.channel_mix import ChannelMix
from timemix.models.layers.resize import resized_table, with_ctx_len
from timemix.models.layers.shifted_block import ShiftedBlock
from timemix.models.rwkv1.config import Rwkv1Config, Rwkv1ExpConfig
from timemix.models.rwkv1.exp_time_mix import ExpTimeMix
from timemix.models.rwkv1.initial import set_initial_values
from timemix.models.rwkv1.time_mix import TimeMix, fusible
from timemix.ops.common import fused
from timemix.ops.common.causal import BLOCK
from timemix.ops.common.spectral import block_length
from timemix.ops.rwkv1.api import DENSE_UP_TO, blocked_up_to, choose_backend


class TimeMixBlock(ShiftedBlock):
    """A block of time-mix, then channel-mix, with norm and token-shift before each sublayer."""

    Ffn = ChannelMix

    @classmethod
    def set_initial_values(cls, model: Model) -> None:
        set_initial_values(model)

    @classmethod
    def mixing_flops(cls, config: ShiftedConfig) -> int:
        """Count the product with W per channel: 2 ctx_len operations (dense), ctx_len (blocked), fewer (spectral)."""
        T = config.ctx_len
        products = T
        if blocked_up_to(torch.float32) < T:
            L = block_length(T)
            products = 5 * L + 4 * T // L
        elif T > DENSE_UP_TO:
            products = (T + BLOCK) // 2
        return config.layers * 2 * config.channels * products

    @classmethod
    def kept(cls, config: ShiftedConfig, rows: int) -> Kept:
        """Count the numbers that `ShiftedBlock` stores, and W of each head: all of W if dense, otherwise part of W."""
        usual = super().kept(config, rows)
        strip = BLOCK if config.ctx_len > DENSE_UP_TO else config.layers * config.ctx_len
        return Kept(usual.block, usual.products, 4 * config.heads * config.ctx_len * strip)

    @classmethod
    def runs_in_c(cls, config: ShiftedConfig, precision: str, device: torch.device) -> bool:
        return fusible(config) and fused.trains(precision, device)


class Rwkv1Block(TimeMixBlock):
    """A block whose time-mix has tables over lags."""

    Mixer = TimeMix

    @classmethod
    def resized(cls, weights: Tensors, config: Rwkv1Config, ctx_len: int) -> Tensors:
        return with_ctx_len(weights, config.ctx_len, ctx_len, logarithms=config.denominator == "weighted")

    @classmethod
    def forms(cls, config: Rwkv1Config, precision: str, device: torch.device, resets: bool = False) -> dict[str, str]:
        name, reason = choose_backend(
            config.backend,
            config.ctx_len,
            getattr(torch, precision),
            free=config.weights == "free",
            weighted=config.denominator == "weighted",
        )
        return {"wkv1": f"{name} ({reason})"}


class Rwkv1ExpBlock(TimeMixBlock):
    """A block whose time-mix has sums of exponentials as curves over lags, and a state of constant size."""

    Mixer = ExpTimeMix

    def state_parameters(self) -> Tensors:
        state = self.mixer.init_state(1)
        numerators, denominators = state["numerators"][0], state["denominators"][0]
        return {"value": numerators, "log_weight": denominators + FIRST_WEIGHT}

    def state_of(self, parameters: Tensors) -> Tensors:
        """Compute the sums of one token with a learned value in each exponential and a learned logarithm of its weight.

        No parameters give a negative sum of weights. The taps, which are the newest tokens of a text, stay zero.
        """
        # (H, N)
        weight = parameters["log_weight"].exp()
        # (H, K, N)
        sums = {"numerators": parameters["value"] * weight[:, None], "denominators": weight}
        return sums | {name: x[0] for name, x in self.mixer.init_state(1).items() if name == "taps"}

    def parameters_of(self, state: Tensors, position: int) -> Tensors:
        if position:
            raise InvalidValue(
                "a state of rwkv1_exp depends on its position in the text, and a learned state begins at position 0;"
                " give a state that timemix export --to state wrote"
            )
        weight = state["denominators"].clamp_min(torch.finfo(state["denominators"].dtype).tiny)
        return {"value": state["numerators"] / weight[:, None], "log_weight": weight.log()}

    @classmethod
    def resized(cls, weights: Tensors, config: Rwkv1ExpConfig, ctx_len: int) -> Tensors:
        """Cut or extend the tables alpha, beta and gamma to a new context length. The curves have values at all lags.

        Beyond their last entry, alpha, beta and gamma already equal the mean of their last quarter.
        """
        tables = {name: x for name, x in weights.items() if name.rpartition(".mixer.")[2] in ("alpha", "beta", "gamma")}
        return weights | {name: resized_table(table, ctx_len) for name, table in tables.items()}

    @classmethod
    def forms(
        cls, config: Rwkv1ExpConfig, precision: str, device: torch.device, resets: bool = False
    ) -> dict[str, str]:
        return {"wkv1": "{} ({})".format(*choose_backend("auto", config.ctx_len, getattr(torch, precision)))}

    def tables(self) -> Tensors:
        return {"f": self.mixer.curve(), **super().tables()}
