"""Features of an image in a joint model: as a modality that shares the image's tokens (ReDi), and as what a tap is aligned with (REPA)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from filled import filled

from mmdiff import losses, schedules, times
from mmdiff.errors import UserError
from mmdiff.nets import DiT, Label, MMDiT, Patches, Tap
from mmdiff.processes import Gaussian, Joint, Noised

B, SIZE = 4, 5
STREAMS = {"features": Patches(2, 2, 3, 1), "image": Patches(4, 4, 1, 2), "label": Label(5, 4)}
X = {"features": normal(0, (B, 2, 2, 3)), "image": normal(1, (B, 4, 4, 1)), "label": np.arange(B, dtype=np.int32)}
T = {name: np.linspace(0.1, 0.9, B, dtype=np.float32) + np.float32(0.01 * i) for i, name in enumerate(STREAMS)}
T["features"] = np.ones(B, np.float32)


def net_of(*names, depth=3, **options):
    return MMDiT({name: STREAMS[name] for name in names}, depth=depth, width=16, heads=2, **options)


def of(names, *trees):
    return [{name: tree[name] for name in names} for tree in trees]


def test_fused_modalities_share_tokens():
    """With the features' embedding 0 what is left is the image alone; with another, they matter, and cost no token."""
    names = ("image", "label")
    options = {"fused": {"features": "image"}, "taps": {"seen": Tap("features", 1, SIZE, hidden=8)}}
    fused, alone = net_of(*STREAMS, depth=2, scan=False, **options), net_of(*names, depth=2, scan=False)
    own = filled(fused, X, T)["params"]
    without = {
        key: jax.tree.map(np.zeros_like, leaf) if key in ("features_in", "features_condition") else leaf for key, leaf in own.items()}
    part = {key: leaf for key, leaf in own.items() if not key.startswith(("features", "seen"))} | {"modality": own["modality"][1:]}

    @jax.jit
    def outputs():
        return [fused.apply({"params": params}, X, T) for params in (own, without)], alone.apply({"params": part}, *of(names, X, T))

    (present, absent), image = jax.tree.map(np.asarray, outputs())
    for name in names:
        np.testing.assert_allclose(absent[name], image[name], rtol=1e-5, atol=1e-5)
        assert np.abs(present[name] - image[name]).max() > 0.01
    assert present["features"].shape == X["features"].shape and present["seen"].shape == (B, 4, SIZE)


def test_a_tap_changes_nothing_but_what_its_term_trains():
    """Weight 0: the loss and the gradient are those without the term, bit for bit. Weight 1: no gradient behind the tap."""
    net = net_of("image", depth=2, taps={"dino": Tap("image", 1, SIZE, conv=True)})
    process = Joint(image=Gaussian(schedules.flow()))
    params = filled(net, *of(("image",), X, T))
    batch = {"image": X["image"], "dino": normal(3, (B, 2, 2, SIZE)), "index": np.arange(B, dtype=np.uint32)}
    own, term = losses.of_parts(process, image=1.0), losses.aligned("dino", "image", center=0.6)

    def found(**terms):
        loss = losses.diffusion(process, net.apply, times.joint(image=times.uniform()), terms)
        return jax.value_and_grad(loss, has_aux=True)(params, batch, jax.random.key(0))

    everything = jax.jit(lambda: [found(**own), found(**own, dino=(0.0, term)), found(dino=(1.0, term))])
    without, zero, alone = jax.tree.map(np.asarray, everything())
    jax.tree.map(np.testing.assert_array_equal, (zero[0][0], zero[1]), (without[0][0], without[1]))
    assert 0 < zero[0][1]["loss/dino"] < 2 and zero[0][1]["loss/dino"] == alone[0][1]["loss/dino"]
    gradient = alone[1]["params"]
    assert not any(leaf[1:].any() for leaf in jax.tree.leaves(gradient["blocks"]))
    assert np.abs(gradient["dino_tap"]["kernel"]).max() > 0 and any(leaf[:1].any() for leaf in jax.tree.leaves(gradient["blocks"]))


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_weights_of_an_image_s_network_begin_as_they_were_with_features_and_taps(scan):
    """DiT: the parameters that it had have their names, and give the image that they gave, whatever the features; trained, they matter."""
    sizes = {"depth": 3, "width": 16, "heads": 2, "scan": scan}
    plain = DiT(STREAMS["image"], 4, **sizes)
    more = plain.clone(fused={"features": STREAMS["features"]}, taps={"dino": Tap("image", 2, SIZE, hidden=8)})
    x, t, label = X["image"], T["image"], X["label"]
    features = {"features": (X["features"], T["features"])}
    weights, fresh = filled(plain, x, t, label)["params"], filled(more, x, t, label, None, features)["params"]
    assert jax.tree.structure({name: fresh[name] for name in weights}) == jax.tree.structure(weights)
    zero = {name: jax.tree.map(np.zeros_like, fresh[name]) for name in ("features_in", "features_condition")}
    begun, trained = fresh | weights | zero, fresh | weights
    of_last = "blocks" if scan else "block_2"
    cut = begun | {of_last: jax.tree.map(lambda leaf: np.concatenate([leaf[:2], 0 * leaf[2:]]) if scan else 0 * leaf, begun[of_last])}

    @jax.jit
    def outputs():
        found = [more.apply({"params": params}, x, t, label, None, features) for params in (begun, cut, trained)]
        return plain.apply({"params": weights}, x, t, label), *found

    alone, (image, out), (_, tapped), (moved, _) = jax.tree.map(np.asarray, outputs())
    np.testing.assert_allclose(image, alone, rtol=1e-5, atol=1e-5)
    assert out["features"].shape == X["features"].shape and out["dino"].shape == (B, 4, SIZE) and np.abs(out["dino"]).max() > 0.01
    np.testing.assert_allclose(tapped["dino"], out["dino"], rtol=1e-5, atol=1e-5)  # of block 2: nothing of block 3 matters
    assert np.abs(moved - alone).max() > 0.01
    if not scan:
        made = jax.jit(more.init)(jax.random.key(0), x, t, label, None, features)["params"]
        assert not any(leaf.any() for name in zero for leaf in jax.tree.leaves(made[name]))


def test_alignment():
    """0 aligned, 1 orthogonal, 2 opposite, whatever the length; the centred features of a constant are 0, and finite."""
    y = np.tile(np.float32([[3.0, 4.0, 0.0]]), (5, 6, 1))
    predicted = np.stack([0.1 * y[0], y[0][:, [2, 2, 0]], -7 * y[0], y[0], np.zeros_like(y[0])])
    noised = Noised(None, None, {"image": np.float32([0.0, 0.5, 0.9, 1.0, 0.5])}, batch={"dino": y})

    @jax.jit
    def values(predicted):
        plain, centred = (losses.aligned("dino", "image", center)({"dino": predicted}, noised) for center in (None, 1.0))
        return plain, centred

    plain, centred = values(predicted)
    np.testing.assert_allclose(plain, [0, 1, 2, 0, 1], atol=1e-6)
    np.testing.assert_allclose(centred, [1, 1, 1, 0, 1], atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: sum(value.sum() for value in values(x))))(predicted)
    assert np.isfinite(gradient).all() and not gradient[3].any()
    for center in ("nan", float("nan"), 2.0, -0.1):
        with pytest.raises(UserError, match="aligned: center is the share of the mean"):
            losses.aligned("dino", "image", center)
    with pytest.raises(UserError, match="'dino' has one: leave it out"):
        losses.aligned("dino", "image", 0.6)({"dino": jnp.asarray(predicted[:, :1])}, noised.replace(batch={"dino": y[:, :1]}))
    for batch, match in (({}, "from a cache"), ({"dino": y[:, :3]}, "3 tokens of 3 numbers in the batch, and 6 tokens of 3"), (
        {"dino": y.reshape(5, 9, 2)}, "9 tokens of 2 numbers in the batch")):
        with pytest.raises(UserError, match=match):
            losses.aligned("dino", "image")({"dino": jnp.asarray(predicted)}, noised.replace(batch=batch))


def test_what_cannot_be_fused_or_tapped_is_refused():
    for match, options in (
        ("cannot share the tokens of 'label'", {"fused": {"features": "label"}}),
        ("cannot share the tokens of 'sound'", {"fused": {"features": "sound"}}),
        ("fewer than the 3 blocks", {"taps": {"dino": Tap("image", 3, SIZE)}}),
        ("one of the modalities", {"taps": {"dino": Tap("sound", 1, SIZE)}}),
        ("a name of its own", {"taps": {"image": Tap("image", 1, SIZE)}}),
    ):
        with pytest.raises(UserError, match=match):
            net_of(*STREAMS, **options)
    with pytest.raises(UserError, match=r"MMDiT: spans must be several names, as \('image',\), not 'image'"):
        net_of(*STREAMS, spans="image")
    for other in (Patches(1, 4, 3, 1), Patches(2, 2, 3, 1, bottleneck=2)):  # as many tokens elsewhere; a layer left out
        with pytest.raises(UserError, match="must be Patches with as many rows and columns of them, 'features' without a stem"):
            MMDiT({**STREAMS, "features": other}, depth=1, width=16, heads=2, fused={"features": "image"})
    with pytest.raises(UserError, match="DiT: 'features' cannot share the tokens of 'image'"):
        DiT(STREAMS["image"], 4, depth=1, width=16, heads=2, fused={"features": Patches(4, 4, 3, 1)})
    with pytest.raises(UserError, match="DiT: the tap 'dino' of 'label' behind block 1 needs .* fewer than the 1 blocks"):
        DiT(STREAMS["image"], 4, depth=1, width=16, heads=2, taps={"dino": Tap("label", 1, SIZE)})
    with pytest.raises(UserError, match="needs the patches of an image"):
        jax.eval_shape(net_of(*STREAMS, taps={"dino": Tap("label", 1, SIZE, conv=True)}).init, jax.random.key(0), X, T)
