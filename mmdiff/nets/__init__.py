"""Networks: pure functions of (parameters, inputs, times) that know no process."""

from mmdiff.nets.attention import attention
from mmdiff.nets.dit import DiT, as_joint, dit, sizes
from mmdiff.nets.embed import Label, Patches, Tokens, Vectors
from mmdiff.nets.mmdit import MMDiT
from mmdiff.nets.text import TextEncoder
from mmdiff.nets.tokens import TokenTransformer, cdcd

__all__ = [
    "DiT", "Label", "MMDiT", "Patches", "TextEncoder", "TokenTransformer", "Tokens", "Vectors",
    "as_joint", "attention", "cdcd", "dit", "sizes",
]
