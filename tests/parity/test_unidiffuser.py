"""UniDiffuser's network beside diffusers': both versions and both kinds of data, all keys of the published size, and its folder."""

import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import torch
from originals import unidiffuser as original

from mmdiff import nets, open_run
from mmdiff.conversion import import_weights
from mmdiff.convert import layouts, unidiffuser
from mmdiff.convert.tensors import Tensor
from mmdiff.publishing import export_weights

TINY = [("model.width", "32"), ("model.heads", "4"), ("model.depth", "4"), ("model.dtype", "float32"), ("data.size", "8"),
        ("data.vector", "6"), ("text.size", "5")]  # fmt: skip
UNREAD = "transformer.pos_embed.proj."


def net_of(length=7, **fields):
    sizes = dict(depth=4, width=32, heads=4, data_types=2, data_type=1)
    return nets.UViT(nets.Patches(8, 8, 4, 2), nets.Vectors(6), nets.Vectors(5, length), **{**sizes, **fields})


def inputs(net):
    shapes = {"image": (3, net.image.channels, net.image.height, net.image.width), "vision": (3, 1, net.vision.size),
              "text": (3, net.text.length, net.text.size)}  # fmt: skip
    x = {name: published.normal(name, shape) for name, shape in shapes.items()}
    t = {name: np.float32(original.STEPS[name]) / np.float32(1000) for name in ("image", "text")}
    return {**x, "image": x["image"].transpose(0, 2, 3, 1), "vision": x["vision"][:, 0]}, {**t, "vision": t["image"]}


def ours(net, params):
    out = jax.tree.map(np.asarray, jax.jit(net.apply)({"params": params}, *inputs(net)))
    return {"image": out["image"].transpose(0, 3, 1, 2), "vision": out["vision"][:, None], "text": out["text"]}


def shapes_of(net):
    return jax.eval_shape(net.init, jax.random.key(0), *jax.tree.map(jnp.asarray, inputs(net)))["params"]


def assert_alike(net, params, model, **options):
    for name, answer in original._answers(model, net, **options).items():
        published.assert_close(ours(net, params)[name], answer, 1e-5)


@pytest.mark.parametrize("data_types, data_type", [(2, 1), (2, 0), (0, 0)])
def test_the_function_and_the_weights_of_diffusers(data_types, data_type):
    net = net_of(data_types=data_types, data_type=data_type)
    model = original._model(net)
    weights = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    params = layouts.load(
        unidiffuser.UNIDIFFUSER, net, shapes_of(net), {key: Tensor.of(array) for key, array in weights.items()}, "it")
    assert_alike(net, params, model, data_type=data_type)
    written = layouts.state_dict(unidiffuser.UNIDIFFUSER_DIFFUSERS, net, params)
    model.load_state_dict({key: torch.from_numpy(array) for key, array in written.items()})
    for key, array in weights.items():
        np.testing.assert_array_equal(written[key], weights[key.replace(UNREAD, "vae_img_in.proj.")] if UNREAD in key else array)


def test_all_keys_of_the_published_size():
    net = nets.UViT(
        nets.Patches(64, 64, 4, 2), nets.Vectors(512), nets.Vectors(64, 77), data_types=2, depth=30, width=1536, heads=24)
    nothing = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes_of(net))  # of full size, without the memory
    config = unidiffuser.diffusers_config(net, {})
    with torch.device("meta"):
        model = diffusers.UniDiffuserModel(**{key: value for key, value in config.items() if key[0] != "_"})
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: tensor.shape for key, tensor in layouts.tensors(unidiffuser.UNIDIFFUSER_DIFFUSERS, net, nothing).items()}
    assert found == expected
    authors = {key: tensor.shape for key, tensor in layouts.tensors(unidiffuser.UNIDIFFUSER, net, nothing).items()}
    assert (len(authors), sum(map(math.prod, authors.values()))) == (17 + 31 * 11 + 15 * 4, 952_509_520)


def test_a_folder_of_diffusers_and_the_authors_file_become_runs_and_a_folder_again(tmp_path):
    net = net_of(length=77)
    model = original._model(net)
    model.save_pretrained(tmp_path / "pipeline/unet")
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    import_weights("joint/unidiffuser", tmp_path / "run", tmp_path / "pipeline", "unidiffuser", TINY)
    run = open_run("joint/unidiffuser", tmp_path / "run")
    assert_alike(run.experiment.net, run.params["params"], model)
    export_weights(run, "diffusers", tmp_path / "again")
    again = diffusers.UniDiffuserModel.from_pretrained(tmp_path / "again")
    for name, answer in original._answers(model, net).items():
        np.testing.assert_array_equal(original._answers(again, net)[name], answer)
    authors = layouts.state_dict(unidiffuser.UNIDIFFUSER, run.experiment.net, run.params["params"])
    torch.save({key: torch.from_numpy(array) for key, array in authors.items()}, tmp_path / "uvit_v1.pth")
    import_weights("joint/unidiffuser", tmp_path / "other", tmp_path / "uvit_v1.pth", "unidiffuser", TINY)
    jax.tree.map(np.testing.assert_array_equal, open_run("joint/unidiffuser", tmp_path / "other").params, run.params)
