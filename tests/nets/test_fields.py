"""Sizes that no network can have: one sentence with the field's name, at construction."""

import dataclasses
import inspect
import math

import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import nets
from mmdiff.errors import UserError
from mmdiff.nets import Patches, audio, fields, tokenizers
from mmdiff.projects.dance.motion import DanceEncoder, MotionEncoder

SIZES = dict(depth=2, width=16, heads=2)
IMAGE = Patches(8, 8, 3, 2, 6)
VALID = [
    IMAGE, nets.Tokens(4, 5, 5), nets.Label(5, 4), nets.Vectors(6, 2), nets.Classes(5, 4), nets.Vector(6), nets.Grid(IMAGE),
    nets.ClassGrid(IMAGE), nets.DiT(IMAGE, 3, in_context=(2, 1), route=(1, 2), **SIZES),
    nets.MMDiT({"image": IMAGE}, route=(1, 2), **SIZES), nets.MiT(IMAGE, 3, head_depth=1, **SIZES), nets.MultiTaskDiT(IMAGE, {}, **SIZES),
    nets.DualStream(IMAGE, None, 8, shared=1, head_width=16, head_heads=2, **SIZES),
    nets.TokenTransformer(classes=5, grid=(4, 4), positions=(4, 4), labels=3, times=10, patch=2, **SIZES),
    nets.TextEncoder(6, 3, **SIZES), MotionEncoder(**SIZES), DanceEncoder(MotionEncoder(**SIZES), genres=3),
    nets.TwoTowers(IMAGE, 7, 6, 8, text_depth=1, text_width=8, **SIZES), tokenizers.VQAutoencoder(8, 8, multipliers=(1,)),
    audio.AudioAutoencoder(1024), nets.Tap("image", 1, 8),
    nets.UViT(IMAGE, nets.Vectors(4), nets.Vectors(6, 2), data_types=2, data_type=1, **SIZES),
]  # fmt: skip


def test_every_network_is_in_the_table():
    found = [kind for module in (nets, tokenizers, audio) for kind in vars(module).values() if inspect.isclass(kind)]
    known = {type(net) for net in VALID}
    kinds = {kind for kind in found if dataclasses.is_dataclass(kind) and issubclass(kind, fields.Network)}
    assert {kind.__name__ for kind in kinds - known} <= {"Autoencoder", "Network"}
    public = {getattr(nets, name) for name in nets.__all__ if inspect.isclass(getattr(nets, name))}
    assert public <= known


def other(net, **values):
    if isinstance(net, fields.Network):
        return net.copy(**values)
    return dataclasses.replace(net, **values)


def numbers(kind):
    return [(net, field) for net in VALID for field in dataclasses.fields(net) if str(field.type).split("[")[-1].startswith(kind)]


@pytest.mark.parametrize("bad", [-1, 0, 1.5, 2.0, "8", True, 10**12, math.nan, [8]], ids=str)
def test_sizes(bad):
    cases = numbers("int")
    assert len(cases) > 60
    for net, field in cases:
        several = isinstance(getattr(net, field.name), tuple)
        if bad == 0 and type(bad) is int and (field.default == 0 or field.name in fields.OR_NONE):
            continue
        with pytest.raises(UserError, match=rf"^{type(net).__name__}: {field.name} must be (a whole number from [01] to [\d,]+|several)"):
            other(net, **{field.name: (bad,) * len(getattr(net, field.name)) if several else bad})


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan, math.inf, "4", True], ids=str)
def test_scales(bad):
    cases = [(net, field) for net, field in numbers("float") if field.name not in ("logits", "interval")]
    names = {"mlp_ratio", "norm_eps", "mlp_norm_eps", "time_scale", "time_offset", "freq_shift", "seconds", "spacing", "guidance"}
    assert {field.name for _, field in cases} == names
    fit = {-1.0: fields.SIGNED, 0.0: fields.SIGNED | {"freq_shift", "seconds"}}.get(bad if type(bad) is float else None, ())
    for net, field in cases:
        if field.name in fit:
            assert getattr(other(net, **{field.name: bad}), field.name) == bad
        else:
            with pytest.raises(UserError, match=f"{type(net).__name__}: {field.name} must be a finite number"):
                other(net, **{field.name: bad})


def test_sizes_that_do_not_fit_each_other():
    for net in VALID:
        if hasattr(net, "heads"):
            for values in (dict(heads=3), dict(width=18), dict(heads=32)):
                with pytest.raises(UserError, match=r"width \d+ does not fit \d+ heads"):
                    other(net, **values)
            with pytest.raises(UserError, match="dtype must be one of floats"):
                other(net, dtype=jnp.int32)
            with pytest.raises(UserError, match="dtype must be one of floats"):
                other(net, dtype="bf")
            assert other(net, width=np.int64(32), dtype="bfloat16").width == 32
            if hasattr(net, "mlp_ratio"):
                with pytest.raises(UserError, match="mlp_ratio 0.01 of a width of 16 is no number of hidden units"):
                    other(net, mlp_ratio=0.01)
    dual, towers = (next(net for net in VALID if isinstance(net, kind)) for kind in (nets.DualStream, nets.TwoTowers))
    with pytest.raises(UserError, match="head_width 18 does not fit 2 heads: head_heads must divide it"):
        other(dual, head_width=18)
    with pytest.raises(UserError, match="of a depth of 2 blocks shared=3 cannot be shared"):
        other(dual, shared=3)
    with pytest.raises(UserError, match="text_width 10 does not fit 2 heads"):
        other(towers, text_width=10)
    with pytest.raises(UserError, match="patches of 3 do not tile an image of 8x8"):
        other(IMAGE, patch=3)
    with pytest.raises(UserError, match="logits are a scale above 0"):
        nets.towers.learned_logits(lambda *_: None, (0.0, 1.0))
