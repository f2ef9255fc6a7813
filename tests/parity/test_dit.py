"""DiT beside the original's modules and diffusers': both functions, all keys of XL/2, and a pipeline's folder that diffusers samples."""

import argparse
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import published
import torch
from originals import dit as original

from mmdiff import nets, open_run
from mmdiff.conversion import import_weights
from mmdiff.convert import diffusers_dit, layouts, published_dit
from mmdiff.convert.kinds import KINDS
from mmdiff.convert.tensors import Tensor
from mmdiff.convert.weight_writer import write_weights
from mmdiff.nets.dit import SIZES
from mmdiff.publishing import export_weights

X, STEPS, LABELS = published.normal("z", (3, 4, 8, 8)), np.array([0, 250, 999]), np.array([0, 3, 10])


def net_of(depth=2, width=32, heads=4, classes=10, image=8, **fields):
    return nets.DiT(nets.Patches(image, image, 4, 2, 8), classes, depth=depth, width=width, heads=heads, time_offset=-1.0, **fields)


def shapes_of(net):
    x = jnp.zeros((1, net.patches.height, net.patches.width, 4))
    return jax.eval_shape(net.init, jax.random.key(0), x, jnp.ones(1), jnp.zeros(1, int))["params"]


def ours(net, params, x=X, steps=STEPS, labels=LABELS):
    inputs = jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray((steps + 1) / 1000, jnp.float32), jnp.asarray(labels)
    return np.asarray(jax.jit(net.apply)({"params": params}, *inputs)).transpose(0, 3, 1, 2)


def loaded(kind, net, model):
    weights = {key: Tensor.of(tensor.numpy()) for key, tensor in model.state_dict().items()}
    return layouts.load(KINDS[kind].layout, net, shapes_of(net), weights, "it")


def theirs(net):
    """diffusers' model; its blocks have the same embedders."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes_of(net))
    weights = {key: published.weight(key, array.shape) for key, array in layouts.state_dict(published_dit.DIT, net, zeros).items()}
    arrays = {key: tensor.read() for key, tensor in diffusers_dit.from_dit({k: Tensor.of(array) for k, array in weights.items()}).items()}
    config = diffusers_dit.transformer_config(net)
    model = diffusers.DiTTransformer2DModel(**{key: value for key, value in config.items() if key[0] != "_"})
    model.load_state_dict({key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()})
    return model.eval()


def answer(model, x=X, steps=STEPS, labels=LABELS):
    with torch.no_grad():
        return model(torch.from_numpy(x), timestep=torch.tensor(steps), class_labels=torch.tensor(labels)).sample.numpy()


def test_diffusers_function_and_the_published_one_of_the_same_weights():
    net = net_of(freq_shift=1.0, mlp_norm_eps=1e-5)
    model = theirs(net)
    params = loaded("diffusers-dit", net, model)
    published.assert_close(ours(net, params), answer(model))
    arrays = layouts.state_dict(diffusers_dit.DIFFUSERS, net, params)
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == {key: array.shape for key, array in arrays.items()}
    for key, tensor in model.state_dict().items():
        np.testing.assert_array_equal(arrays[key], tensor.numpy())

    net = net_of()  # of the original
    params = loaded("dit", net, model)
    assert np.abs(ours(net, params) - answer(model)).max() > 0.1
    first = original.DiT(8, 2, 4, 32, 2, 4, 10)
    written = layouts.state_dict(published_dit.DIT, net, params)
    first.load_state_dict({key: torch.from_numpy(array) for key, array in written.items()})
    with torch.no_grad():
        expected = first(torch.from_numpy(X), torch.tensor(STEPS).float(), torch.tensor(LABELS)).numpy()
    published.assert_close(ours(net, params), expected)


def test_all_keys_of_xl_2():
    net = net_of(depth=28, width=1152, heads=16, classes=1000, image=32)
    nothing = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes_of(net))  # of full size, without the memory
    config = diffusers_dit.transformer_config(net)
    with torch.device("meta"):
        their = diffusers.DiTTransformer2DModel(**{key: value for key, value in config.items() if key[0] != "_"})
        first = original.DiT(32, 2, 4, 1152, 28, 16, 1000)
    sizes = {first: (292, 674_834_720 + 256 * 1152), their: (538, 749_826_464)}
    for layout, model in ((published_dit.DIT, first), (diffusers_dit.DIFFUSERS, their)):
        expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        assert {key: tensor.shape for key, tensor in layouts.tensors(layout, net, nothing).items()} == expected
        assert (len(expected), sum(map(math.prod, expected.values()))) == sizes[model]


def test_all_keys_of_lightningdit_xl_1():
    fields = dict(depth=28, width=1152, heads=16, norm="rms", mlp="swiglu", rope=True, time_scale=-1.0, time_offset=1.0)
    net = nets.DiT(nets.Patches(16, 16, 32, 1), 1000, **fields)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 16, 16, 32)), jnp.ones(1), jnp.zeros(1, int))["params"]
    nothing = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    with torch.device("meta"):
        model = original.LightningDiT()
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in layouts.tensors(published_dit.LIGHTNING, net, nothing).items()} == expected
    assert len(expected) == 351 and sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 674_961_824


def test_diffusers_samples_from_the_pipeline_that_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "XS", (2, 32, 4))
    options = [("model.size", "XS"), ("model.image", "8"), ("model.dtype", "float32"), ("model.freq_shift", "1"),
               ("model.mlp_norm_eps", "1e-5")]  # fmt: skip
    net = net_of(classes=1000, freq_shift=1.0, mlp_norm_eps=1e-5)
    model = theirs(net)
    write_weights(tmp_path / "it.safetensors", {key: tensor.numpy() for key, tensor in model.state_dict().items()})
    import_weights("imagenet256/dit_xl2", tmp_path / "run", tmp_path / "it.safetensors", "diffusers-dit", options)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    run = open_run("imagenet256/dit_xl2", tmp_path / "run")
    said = export_weights(run, "diffusers", tmp_path / "pipeline", tmp_path / "vae")
    assert not any("another function" in line for line in said)

    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.transformer.config.norm_eps == 1e-5 and pipeline.get_label_ids(["207"]) == [207]
    np.testing.assert_array_equal(answer(pipeline.transformer), answer(model))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([207, 3], guidance_scale=4.0, num_inference_steps=3, output_type="np", generator=torch.manual_seed(0)).images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()
    # A checkpoint of the original training code: its average is taken, in whatever layout.
    state = {key: torch.from_numpy(array) for key, array in layouts.state_dict(published_dit.DIT, net, run.params["params"]).items()}
    others = {"model": {key: 0 * tensor for key, tensor in state.items()}, "opt": {}, "args": argparse.Namespace(model="DiT-XS/2")}
    torch.save(others | {"ema": state}, tmp_path / "checkpoint.pt")
    import_weights("imagenet256/dit_xl2", tmp_path / "average", tmp_path / "checkpoint.pt", "dit", options[:3])
    jax.tree.map(np.testing.assert_array_equal, run.params, open_run("imagenet256/dit_xl2", tmp_path / "average").params)
    # The folder comes back as a run with the same weights; what is told is the original's, where the weights are.
    import_weights("imagenet256/dit_xl2", tmp_path / "again", tmp_path / "pipeline", "dit", options[:3])
    again = open_run("imagenet256/dit_xl2", tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, run.params, again.params)
    assert any("another function" in line for line in export_weights(again, "diffusers", tmp_path / "other", tmp_path / "vae"))
