"""Opening published networks: files and folders in every accepted layout, configurations, kinds, types, shardings."""

import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiers import some

from mmdiff.convert import Tensor, state_dicts, write_weights
from mmdiff.encoders import KINDS, autoencoder_layouts, open_encoder, preprocessing, published_networks, split_over
from mmdiff.encoders.autoencoder_kl import AutoencoderKL
from mmdiff.encoders.t5 import T5Encoder
from mmdiff.errors import UserError

SIGLIP = {part: published.SMALL["clip"][part] for part in ("text_config", "vision_config")} | {"model_type": "siglip"}
F8 = autoencoder_layouts.levels([8, 8, 16, 16]) | {"norm_num_groups": 4}
SMALL = {  # kind -> config.json
    "autoencoder_kl": F8,
    "autoencoder_tiny": {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4},
    "vq_model": F8 | {"num_vq_embeddings": 64, "latent_channels": 4},
    "clip_text": published.SMALL["clip"],
    "clip_vision": published.SMALL["clip"],
    "clip": published.SMALL["clip"],
    "siglip": SIGLIP,
    "siglip_text": SIGLIP,
    "siglip_vision": SIGLIP,
    "dinov2": published.SMALL["dinoreg"],
    "t5": published.SMALL["t5"],
    "sentence_bert": published.SMALL["bert"],
    "inception": {},
    "efficientnet_lite0": {},
}
NETS = {kind: KINDS[kind].cls.from_config(config) for kind, config in SMALL.items()}


@functools.cache
def small_weights(kind):
    """Weights by published keys, each of one number: those of the golden files would take seconds for Inception."""
    shapes = state_dicts.expected(published.abstract(NETS[kind]))
    return {key: np.full(shape, len(key) % 7 + i, np.float32) for i, (key, shape) in enumerate(shapes.items())}


def written(folder, kind, **options):
    """A published folder with weights of a small network: the weights."""
    weights = small_weights(kind)
    write_weights(folder, weights, NETS[kind].config(), **options)
    return weights


def assert_holds(encoder, weights):
    found = state_dicts.state_dict(encoder.params)
    assert found.keys() == weights.keys() and all(np.array_equal(found[key], weights[key]) for key in weights)


def test_every_kind_has_a_small_network_here():
    assert set(SMALL) == set(KINDS)


@pytest.mark.parametrize("kind", some(SMALL, "autoencoder_kl", "vq_model", "clip", "siglip_text", "dinov2", "efficientnet_lite0"))
def test_every_kind_opens_from_a_folder_and_from_a_file_with_its_configuration(tmp_path, kind):
    weights = written(tmp_path / "out", kind)
    encoder = open_encoder(kind, tmp_path / "out")
    assert encoder.net.config() == NETS[kind].config() and encoder.kind == kind and encoder.licence and len(encoder.fingerprint) == 64
    assert encoder.counts == {"tensors": len(weights), "parameters": sum(w.size for w in weights.values()), "dtype": "float32"}
    assert_holds(encoder, weights)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(encoder.params))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    alone = open_encoder(kind, file.rename(tmp_path / "alone.safetensors"), config=SMALL[kind], dtype=jnp.bfloat16)
    assert (alone.net.config(), alone.net.dtype) == (encoder.net.config(), jnp.bfloat16) and alone.fingerprint == encoder.fingerprint
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), alone.params, encoder.params))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("autoencoder_tiny", preprocessing.AUTOENCODER),
        ("dinov2", preprocessing.DINOV2),
        ("clip_vision", preprocessing.Preprocessing(32, **preprocessing.CLIP_STATISTICS)),
        ("siglip_vision", preprocessing.Preprocessing(32, "square", mean=0.5, std=0.5)),
        ("t5", None),
    ],
)
def test_preprocessing_is_the_network_s_unless_its_file_lies_beside(tmp_path, kind, expected):
    written(tmp_path / "out", kind)
    assert open_encoder(kind, tmp_path / "out").preprocessing == expected
    (tmp_path / "out" / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 40}, "crop_size": 36, "resample": 2}))
    if expected is not None:
        assert open_encoder(kind, tmp_path / "out").preprocessing == preprocessing.Preprocessing(36, kernel="bilinear", shortest=40)


@pytest.fixture
def pipeline(tmp_path):
    """A folder of diffusers with a text encoder, an autoencoder and parts of other kinds."""
    parts = {"vae": "autoencoder_kl", "text_encoder": "clip_text", "text_encoder_3": "t5"}
    for name, kind in parts.items():
        written(tmp_path / "pipe" / name, kind)
    (tmp_path / "pipe" / "scheduler").mkdir()
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    return tmp_path / "pipe"


def test_a_pipeline_s_part_is_found_by_its_kind(pipeline):
    for kind in ("autoencoder_kl", "t5", "clip_text"):
        assert_holds(open_encoder(kind, pipeline), small_weights(kind))
    with pytest.raises(UserError, match=r"no part of the kind vq_model: it has text_encoder \(clip_text_model\), .*vae \(AutoencoderKL\)"):
        open_encoder("vq_model", pipeline)
    shutil.copytree(pipeline / "text_encoder", pipeline / "text_encoder_2")
    with pytest.raises(UserError, match=r"several parts of the kind clip_text \(text_encoder, text_encoder_2\): name one"):
        open_encoder("clip_text", pipeline)
    assert open_encoder("clip_text", pipeline / "text_encoder_2").net == NETS["clip_text"]


def test_without_a_configuration_the_published_one_with_these_tensors_is_taken(tmp_path, monkeypatch):
    written(tmp_path / "out", "t5")
    (tmp_path / "out" / "config.json").unlink()
    small = SMALL["t5"]
    monkeypatch.setattr("mmdiff.encoders.t5.CONFIGS", {"a": small | {"num_layers": 1}, "b": small, "c": small})
    assert open_encoder("t5", tmp_path / "out").net == NETS["t5"]
    monkeypatch.setattr("mmdiff.encoders.t5.CONFIGS", {"a": small, "b": small | {"relative_attention_max_distance": 64}})
    with pytest.raises(UserError, match=r"a, b have its tensors: put its config.json beside it, or name one \(config='a'\)"):
        open_encoder("t5", tmp_path / "out")
    assert open_encoder("t5", tmp_path / "out", config="b").net.relative_attention_max_distance == 64
    monkeypatch.setattr("mmdiff.encoders.t5.CONFIGS", {"a": small | {"num_layers": 1}})
    with pytest.raises(UserError, match="no published t5 has its tensors"):
        open_encoder("t5", tmp_path / "out")


def test_the_whole_checkpoint_of_a_latent_diffusion_model_opens_as_its_autoencoder(tmp_path):
    weights = small_weights("autoencoder_kl")
    whole = {f"first_stage_model.{key}": array for key, array in autoencoder_layouts.to_ldm(weights).items()}
    write_weights(tmp_path / "whole.safetensors", whole | {"model.diffusion_model.out.2.bias": np.zeros(4, np.float16)})
    assert_holds(open_encoder("autoencoder_kl", tmp_path / "whole.safetensors", config=F8), weights)


def test_half_precision_files_give_float32_parameters(tmp_path):
    weights = {key: array.astype(jnp.bfloat16) for key, array in small_weights("t5").items()}
    write_weights(tmp_path / "out", weights, NETS["t5"].config(), shard_size=10_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    encoder = open_encoder("t5", tmp_path / "out")
    assert encoder.counts["dtype"] == "bfloat16" and len(encoder.files) > 2
    assert_holds(encoder, {key: array.astype(np.float32) for key, array in weights.items()})
    ids, mask = encoder.net.example_inputs()
    assert jax.jit(encoder.apply)(ids, mask).shape == (1, 2, 32)


@pytest.mark.parametrize(
    ("kind", "what", "options", "message"),
    [
        ("t6", "t5", {}, "no published network is of the kind 't6': there are autoencoder_kl, "),
        ("t5", "none", {}, "no such file"),
        ("sentence_bert", "t5", {}, "is a t5, not a sentence_bert"),
        ("sentence_bert", "t5", {"config": {}}, r"lacks .*, .* and \d+ more: it holds another network"),
        ("t5", "t5", {"config": {**SMALL["t5"], "num_layers": 3}}, r"lacks encoder.block.2.layer.* and \d more"),
        ("t5", "t5", {"config": {**SMALL["t5"], "num_layers": 1}}, r"has encoder.block.1.layer.* and \d more, which"),
        ("t5", "t5", {"config": {**SMALL["t5"], "d_ff": 40}}, r"other shapes than the network: .*\[48, 32\] for \[40, 32\]"),
        ("t5", "t5/model.safetensors", {"config": "t5-v1_1-huge"}, "nor one of the configurations of t5: t5-v1_1-small"),
        ("t5", "t5", {"dtype": jnp.float16}, "overflows in float16"),
        ("t5", "t5", {"dtype": "flot32"}, "dtype='flot32' of a published network must be one of float32, bfloat16"),
        ("t5", "t5", {"config": {**SMALL["t5"], "num_layers": 10**9}}, "num_layers = 1000000000 in its configuration is no value"),
        ("t5", "t5", {"config": {**SMALL["t5"], "num_layers": "x"}}, "num_layers = 'x' in its configuration is no value"),
        ("t5", "t5", {"config": {**SMALL["t5"], "d_model": -1}}, "d_model = -1 in its configuration is no value"),
        ("t5", "t5", {"config": {**SMALL["t5"], "layer_norm_epsilon": 0.0}}, "layer_norm_epsilon = 0.0 in its configuration is no value"),
        ("t5", "t5", {"config": {**SMALL["t5"], "layer_norm_epsilon": float("nan")}}, "layer_norm_epsilon = nan in its configuration"),
        ("t5", "t5", {"config": {**SMALL["t5"], "num_heads": 0}}, "the configuration of .*t5 makes no t5"),
        ("clip_text", "t5", {"config": {"text_config": 3}}, "the configuration of .*t5 makes no clip_text"),
        ("t5", "t5", {"within": "ema"}, "has no 'ema' in it"),
    ],
)  # fmt: skip
def test_what_cannot_be_opened_is_one_sentence(tmp_path, kind, what, options, message):
    written(tmp_path / "t5", "t5")
    with pytest.raises(UserError, match=message) as error:
        open_encoder(kind, tmp_path / what, **options)
    assert "\n" not in str(error.value)


def test_half_precision_is_refused_where_the_configuration_says_that_it_overflows(tmp_path):
    weights = written(tmp_path / "out", "autoencoder_kl")
    with pytest.raises(UserError, match="float16 overflows"):
        open_encoder("autoencoder_kl", tmp_path / "out", dtype=jnp.float16)
    write_weights(tmp_path / "fixed", weights, AutoencoderKL.from_config(F8 | {"force_upcast": False}).config())
    assert open_encoder("autoencoder_kl", tmp_path / "fixed", dtype=jnp.float16).net.dtype == jnp.float16


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    weights = written(tmp_path / "a", "t5")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = open_encoder("t5", tmp_path / "a").fingerprint
    assert open_encoder("t5", tmp_path / "b").fingerprint == first
    changed = weights["shared.weight"].copy()
    changed[0, 0] += 1
    write_weights(tmp_path / "c", weights | {"shared.weight": changed}, NETS["t5"].config())
    assert open_encoder("t5", tmp_path / "c").fingerprint != first
    other = NETS["t5"].config() | {"relative_attention_max_distance": 64}
    assert open_encoder("t5", tmp_path / "a", config=other).fingerprint != first


def test_parameters_lie_as_their_shardings_say_and_each_part_is_read_once(tmp_path, monkeypatch):
    weights = written(tmp_path / "out", "sentence_bert")
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    monkeypatch.setattr(published_networks, "SPLIT_SIZE", 1000)
    read, numbers = Tensor.read, []
    monkeypatch.setattr(Tensor, "read", lambda tensor, index=(): numbers.append(read(tensor, index).size) or read(tensor, index))
    encoder = open_encoder("sentence_bert", tmp_path / "out", sharding=split_over(mesh))
    monkeypatch.undo()
    assert sum(numbers) == encoder.counts["parameters"]
    assert_holds(encoder, weights)
    split = [leaf for leaf in jax.tree.leaves(encoder.params) if not leaf.is_fully_replicated]
    assert len(split) > 5 and all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in split)
    assert all(leaf.size < 1000 for leaf in jax.tree.leaves(encoder.params) if leaf.is_fully_replicated)
    columns = NamedSharding(mesh, PartitionSpec(None, "data"))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    by_rule = open_encoder("sentence_bert", tmp_path / "out", sharding=lambda path, leaf: columns if leaf.ndim > 1 else rows)
    assert_holds(by_rule, weights)


MEMORY = """
import ctypes, gc, json, re, sys, tracemalloc
import jax, numpy as np
from jax.sharding import Mesh
from mmdiff.convert import open_weights, state_dicts, tensors
from mmdiff.encoders import T5Encoder, open_encoder, split_over
from mmdiff.encoders.published_configs import abstract_params

folder, small = sys.argv[1:]
tensors.BLOCK = 2**20  # in proportion to the files
sharding = split_over(Mesh(np.array(jax.devices()), ("fsdp",)))


def resident(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024


def beyond(load):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # the peak of resident memory starts anew
    before = resident("VmRSS")
    tracemalloc.start()
    params = load()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    placed = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    print(resident("VmHWM") - before - placed, numpy_peak)


def whole():
    net = T5Encoder.from_config(json.load(open(f"{folder}/config.json")))
    shapes = abstract_params(net)
    host = state_dicts.load_params(shapes, net.canonical(open_weights(folder)), folder)
    return jax.device_put(host, jax.tree.map_with_path(sharding, shapes))


open_encoder("t5", small, sharding=sharding)  # what jax itself needs
beyond(lambda: open_encoder("t5", folder, sharding=sharding).params)
beyond(whole)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_onto_a_mesh_holds_less_than_a_part_of_the_files_beside_the_placed_parameters(tmp_path):
    """A twentieth of T5-XXL's shape in bfloat16, in four files, onto eight devices: resident memory of the process beyond the placed
    arrays, and what Python and NumPy have allocated (the devices' own memory is not in it), at their peaks; then the same of reading all
    first, which the measure must see."""
    size = 20_000_000
    large = T5Encoder(4000, 512, 64, 1280, 12, 8, feed_forward_proj="gated-gelu")
    weights = {key: np.full(shape, 1, jnp.bfloat16) for key, shape in state_dicts.expected(published.abstract(large)).items()}
    write_weights(tmp_path / "large", weights, large.config(), shard_size=size)
    written(tmp_path / "small", "t5")
    assert len(list((tmp_path / "large").glob("*.safetensors"))) == 4
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | flags)
    assert not done.returncode, done.stderr
    streamed, whole = ([int(number) / size for number in line.split()] for line in done.stdout.splitlines())
    assert max(streamed) <= 1.3 and min(whole) > 3, (streamed, whole)


def test_an_autoencoder_in_two_files(tmp_path):
    """As TAESD was published: its halves apart, their layers numbered in each, the decoder's from 1."""
    weights = small_weights("autoencoder_tiny")
    for part, first in (("encoder", 0), ("decoder", 1)):
        keys = [key.split(".", 3) for key in weights if key.startswith(part)]
        half = {f"{int(number) + first}.{leaf}": weights[f"{part}.layers.{number}.{leaf}"] for _, _, number, leaf in keys}
        write_weights(tmp_path / f"taesd_{part}.safetensors", half)
    encoder = open_encoder("autoencoder_tiny", tmp_path, config=SMALL["autoencoder_tiny"])
    assert_holds(encoder, weights)
    assert [path.name for path in encoder.files] == ["taesd_decoder.safetensors", "taesd_encoder.safetensors"]
