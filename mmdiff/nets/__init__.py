"""Networks: pure functions of (parameters, inputs, times) that know no process."""

from mmdiff.nets.dit import DiT, as_joint, options, sizes
from mmdiff.nets.dual import DualStream, image_kv_cache, with_image_cache
from mmdiff.nets.embed import Label, Patches, Tokens, Vectors
from mmdiff.nets.mit import MiT
from mmdiff.nets.mmdit import MMDiT
from mmdiff.nets.multitask import Classes, ClassGrid, Grid, MultiTaskDiT, Vector
from mmdiff.nets.taps import Tap
from mmdiff.nets.text import TextEncoder
from mmdiff.nets.tokens import TokenTransformer, cdcd
from mmdiff.nets.towers import TwoTowers
from mmdiff.nets.uvit import UViT

__all__ = [
    "ClassGrid", "Classes", "DiT", "DualStream", "Grid", "Label", "MMDiT", "MiT", "MultiTaskDiT", "Patches", "Tap",
    "TextEncoder", "TokenTransformer", "Tokens", "TwoTowers", "UViT", "Vector", "Vectors", "as_joint", "cdcd", "image_kv_cache",
    "options", "sizes", "with_image_cache",
]  # fmt: skip
