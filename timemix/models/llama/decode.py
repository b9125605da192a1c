"""The compiled decode step of llama, by the C code of models/attention."""

from typing import Any, cast

from timemix.models.attention.decode import MIXER, AttentionStep
from timemix.models.layers.block import Block
from timemix.models.llama.config import LlamaConfig
from timemix.models.llama.model import LlamaBlock
from timemix.models.step_memory import Shift
from timemix.ops.common.fused import ACTIVATION_KINDS


class LlamaStep(AttentionStep):
    """The compiled decode step of llama."""

    def layer_fields(self, block: Block) -> dict[str, Any]:
        """Return the weights of a block."""
        block, given = cast(LlamaBlock, block), self.parameters
        return {
            "mixer_norm": given.norm(block.mixer_norm),
            "ffn_norm": given.norm(block.ffn_norm),
            "shift": Shift(),
            **{name: given.linear(getattr(block.mixer, name)) for name in MIXER},
            "ffn_key": given.linear(block.ffn.gate),
            "ffn_value": given.linear(block.ffn.up),
            "ffn_output": given.linear(block.ffn.down),
        }

    def model_fields(self) -> dict[str, Any]:
        """Return the sizes of the sublayers, which are equal in all layers, and the rotations."""
        config = cast(LlamaConfig, self.model.config)
        return {
            "heads": config.heads,
            "key_heads": config.heads // config.groups,
            "hidden": config.ffn_hidden,
            "activation": ACTIVATION_KINDS.index("silu"),
            **self.rotations(config.rotary_base, config.head_size),
        }
