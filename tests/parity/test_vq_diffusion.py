"""VQ-Diffusion beside diffusers' transformer, whose layout and function it shares."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import published
import torch

from mmdiff import nets
from mmdiff.convert import layouts, vq_diffusion
from mmdiff.convert.kinds import KINDS
from mmdiff.convert.tensors import Tensor
from mmdiff.convert.weight_files import open_weights

IDS = published.token_ids("vq tokens", (3, 16), 13)


def test_the_function_and_the_keys_of_diffusers():
    net = nets.TokenTransformer(
        classes=12, grid=(4, 4), width=32, heads=4, depth=2, times=10, mlp_ratio=4.0, context=("text",))  # fmt: skip
    x = {"tokens": jnp.asarray(IDS), "text": jnp.asarray(published.normal("vq context", (3, 7, 24)))}
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, {"tokens": jnp.ones(3)})["params"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    keys = layouts.state_dict(vq_diffusion.VQ_DIFFUSION_DIFFUSERS, net, zeros)
    config = vq_diffusion.diffusers_config(net, keys)
    model = published.torch_model(diffusers.Transformer2DModel(**{key: value for key, value in config.items() if key[0] != "_"}))
    weights = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    assert {key: array.shape for key, array in keys.items()} == {key: array.shape for key, array in weights.items()}

    tensors = {key: Tensor.of(array) for key, array in weights.items()}
    params = layouts.load(KINDS["vq-diffusion"].layout, net, shapes, tensors, "it")
    for key, array in layouts.state_dict(vq_diffusion.VQ_DIFFUSION_DIFFUSERS, net, params).items():
        np.testing.assert_array_equal(array, weights[key])
    apply = jax.jit(net.apply)
    for index in (0, 4, 9):  # diffusers takes one time for all
        found = jax.nn.log_softmax(apply({"params": params}, x, {"tokens": jnp.full(3, (index + 1) / 10)})["tokens"])
        with torch.no_grad():
            expected = model(torch.tensor(IDS).long(), torch.from_numpy(np.array(x["text"])), torch.tensor(index)).sample.mT.numpy()
        published.assert_close(found, expected)


def test_all_keys_of_the_published_size():
    """19 blocks of 1,024 wide with 16 heads, 32 x 32 tokens, CLIP's states of 512: the pipelines that are published."""
    net = nets.TokenTransformer(
        classes=2886, grid=(32, 32), width=1024, heads=16, depth=19, times=100, mlp_ratio=4.0, context=("text",))  # fmt: skip
    x = {"tokens": jnp.zeros((1, 1024), int), "text": jnp.zeros((1, 77, 512))}
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, {"tokens": jnp.ones(1)})["params"]
    nothing = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    keys = layouts.tensors(vq_diffusion.VQ_DIFFUSION_DIFFUSERS, net, nothing)
    config = vq_diffusion.diffusers_config(net, keys)
    assert config["num_vector_embeds"] == 2887 and config["cross_attention_dim"] == 512
    with torch.device("meta"):
        model = diffusers.Transformer2DModel(**{key: value for key, value in config.items() if key[0] != "_"})
    assert {key: tensor.shape for key, tensor in keys.items()} == {key: tuple(x.shape) for key, x in model.state_dict().items()}


def test_a_list_of_classes_is_a_file_of_one_tensor(tmp_path):
    classes = torch.tensor([0, 1, 0, 2])
    for older in (False, True):
        torch.save(classes, tmp_path / "list.pt", _use_new_zipfile_serialization=not older)
        np.testing.assert_array_equal(open_weights(tmp_path / "list.pt", "")[""].read(), classes.numpy())
