"""Weights read and written: PyTorch's own files bit for bit, safetensors, parts, folders, views, sub-dictionaries."""

import json
import pathlib

import forged
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mmdiff.convert import Tensor, open_weights, write_weights
from mmdiff.convert.tensors import stack
from mmdiff.convert.weight_files import SAFETENSORS, find_weights
from mmdiff.errors import UserError

FILES = pathlib.Path(__file__).parent / "torch_files"
BITS = {"bfloat16": np.int16, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8}


@pytest.mark.parametrize("name", ["zip.pt", "older.pt"])
def test_what_pytorch_has_written_is_read_bit_for_bit(name):
    weights, values = open_weights(FILES / name), dict(np.load(FILES / "values.npz"))
    if name == "older.pt":
        values = {key: value for key, value in values.items() if not key.startswith("float8")}
    assert set(weights) == set(values)
    for key, value in values.items():
        found = weights[key].read()
        assert (found.shape, found.dtype) == (weights[key].shape, weights[key].dtype) and weights[key].shape == value.shape
        assert str(found.dtype) == (key if key in BITS else str(value.dtype))
        np.testing.assert_array_equal(found.view(BITS.get(key, found.dtype)), value)
        if value.ndim == 2 and value.size:
            np.testing.assert_array_equal(weights[key].read((slice(1, 2), slice(0, 2))).view(BITS.get(key, found.dtype)), value[1:2, :2])


@pytest.mark.parametrize(
    ("name", "within", "expected"),
    [("training.pt", None, 1), ("training.pt", "ema", 1), ("training.pt", "model", 0), ("lightning.ckpt", None, 0)],
)
def test_the_wanted_dictionary_of_a_training_checkpoint(name, within, expected):
    weights = open_weights(FILES / name, within)
    table = np.arange(6, dtype=np.float32).reshape(2, 3) % 5
    assert list(weights) == ["weight", "bias"]
    np.testing.assert_array_equal(weights["weight"].read(), table + expected)


def test_a_module_s_state_and_a_dictionary_within_another(tmp_path):
    assert sorted(open_weights(FILES / "state_dict.bin"))[:3] == ["0.bias", "0.weight", "1.bias"]
    inner = forged.dictionary(state=forged.dictionary(ema=forged.SOUND), model=forged.dictionary(bias=forged.tensor()))
    (tmp_path / "a.pt").write_bytes(forged.zipped(inner))
    assert list(open_weights(tmp_path / "a.pt")) == ["bias"]
    assert list(open_weights(tmp_path / "a.pt", "state/ema")) == ["weight"]


@pytest.mark.parametrize(
    ("name", "within", "message"),
    [
        ("module.pt", None, "is a pickled torch.nn.modules.linear.Linear"),
        ("class_among_weights.pt", None, "has torch.nn.modules.activation.ReLU for 'extra' among its weights"),
        ("sparse.pt", None, "torch._utils._rebuild_sparse_tensor"),
        ("torchscript.pt", None, "TorchScript"),
        ("training.pt", "average", r"has no 'average' \(it holds model, ema, opt, args\)"),
        ("training.pt", "args", "its 'args' is no dictionary of tensors"),
        ("lightning.ckpt", "hyper_parameters", "its 'hyper_parameters' is no dictionary of tensors"),
    ],
)
def test_what_is_no_state_dict_is_one_sentence(name, within, message):
    with pytest.raises(UserError, match=message) as error:
        open_weights(FILES / name, within)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_prefix_of_a_wrapper_of_the_whole_module_is_left_out(tmp_path, prefix):
    array = np.zeros(2, np.float32)
    [path] = write_weights(tmp_path / "a.safetensors", {f"{prefix}a": array, f"{prefix}b": array})
    assert sorted(open_weights(path)) == ["a", "b"]
    [path] = write_weights(tmp_path / "b.safetensors", {f"{prefix}a": array, "b": array})
    assert sorted(open_weights(path)) == sorted([f"{prefix}a", "b"])


def test_several_dictionaries_of_tensors_are_named(tmp_path):
    (tmp_path / "a.pt").write_bytes(forged.zipped(forged.dictionary(encoder=forged.SOUND, decoder=forged.SOUND)))
    with pytest.raises(UserError, match="several dictionaries of tensors, name one: encoder, decoder"):
        open_weights(tmp_path / "a.pt")
    assert list(open_weights(tmp_path / "a.pt", "decoder")) == ["weight"]


def every_type():
    return {name: jnp.arange(6).reshape(2, 3).astype(name) if name in ("bfloat16",) or name.startswith("float8")
            else np.arange(6).reshape(2, 3).astype(name) for name in SAFETENSORS.values()}  # fmt: skip


def test_every_type_is_written_and_read_bit_for_bit_and_the_format_s_library_agrees(tmp_path):
    arrays = every_type() | {"scalar": np.float32(4.6052), "empty": np.zeros((0, 3), np.float16)}
    [path] = write_weights(tmp_path / "a.safetensors", arrays)
    weights = open_weights(path)
    assert set(weights) == set(arrays)
    for key, array in arrays.items():
        assert (weights[key].dtype, weights[key].shape) == (np.asarray(array).dtype, np.shape(array))
        assert weights[key].read().tobytes() == np.asarray(array).tobytes()
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(arrays)
        for key in set(arrays) - {key for key in arrays if key.startswith("float8")}:  # which it does not give to NumPy
            assert file.get_tensor(key).tobytes() == np.asarray(arrays[key]).tobytes()
    safetensors.numpy.save_file({"x": np.asarray(arrays["bfloat16"]), "y": np.asarray(arrays["float16"])}, tmp_path / "b.safetensors")
    assert open_weights(tmp_path / "b.safetensors")["x"].read().tobytes() == np.asarray(arrays["bfloat16"]).tobytes()


def test_a_transposed_view_is_written_in_the_order_of_its_shape(tmp_path):
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    [path] = write_weights(tmp_path / "a.safetensors", {"view": table.T, "rows": table[1:, ::2], "lazy": Tensor.of(table).transpose(1, 0)})
    found = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(found["view"], table.T)
    np.testing.assert_array_equal(found["lazy"], table.T)
    np.testing.assert_array_equal(found["rows"], table[1:, ::2])


def test_parts_have_an_index_and_one_file_has_none(tmp_path):
    arrays = {f"layer.{i}": np.full((10, 10), i, np.float32) for i in range(5)}
    written = write_weights(tmp_path / "whole", arrays, {"model_type": "t5"})
    assert [path.name for path in written] == ["config.json", "model.safetensors"]
    written = write_weights(tmp_path / "parts", arrays, {"_class_name": "AutoencoderKL"}, shard_size=900)
    stem = "diffusion_pytorch_model"
    names = [f"{stem}-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [path.name for path in written] == ["config.json", *names, f"{stem}.safetensors.index.json"]
    index = json.loads((tmp_path / "parts" / f"{stem}.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000} and index["weight_map"]["layer.4"] == names[2]
    for folder in ("whole", "parts"):
        weights = open_weights(tmp_path / folder)
        assert set(weights) == set(arrays) and all(np.array_equal(weights[key].read(), arrays[key]) for key in arrays)
    assert set(open_weights(tmp_path / "parts" / f"{stem}.safetensors.index.json")) == set(arrays)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["model.fp16.safetensors", "model.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "model.fp16.safetensors"),
        (["diffusion_pytorch_model.fp16.safetensors", "config.json"], "diffusion_pytorch_model.fp16.safetensors"),
        (["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.bin"], "diffusion_pytorch_model.non_ema.safetensors"),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json", "z.safetensors"], "model.safetensors.index.json"),
        (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"], "model.safetensors.index.fp16.json"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"], "pytorch_model.bin.index.json"),
        (["open_clip_pytorch_model.bin", "open_clip_model.safetensors"], "open_clip_model.safetensors"),
        (["ae.safetensors", "flux.ckpt"], "ae.safetensors"),
        (["vqgan.ckpt", "model.yaml"], "vqgan.ckpt"),
        ([".model.safetensors", "a.pth"], "a.pth"),
    ],
)  # fmt: skip
def test_the_weights_of_a_folder(tmp_path, names, chosen):
    for name in names:
        (tmp_path / name).touch()
    assert find_weights(tmp_path).name == chosen


def test_nothing_is_written_over_or_by_halves(tmp_path):
    arrays = {"a": np.zeros(3, np.float32)}
    write_weights(tmp_path / "out", arrays, {})
    for path in ("out", "out/config.json/x", "out/model.safetensors"):
        with pytest.raises(UserError):
            write_weights(tmp_path / path, arrays)
    with pytest.raises(UserError, match="a is complex256|a is <U1|a is object"):
        write_weights(tmp_path / "b", {"a": np.array(["x"])})
    with pytest.raises(UserError, match="config.json lies in a folder of its own"):
        write_weights(tmp_path / "b.safetensors", arrays, {})

    def fail(index):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_weights(tmp_path / "c", arrays | {"b": Tensor((2,), np.dtype("float32"), fail)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_parts_of_stored_tensors_are_those_of_the_array(tmp_path, monkeypatch):
    monkeypatch.setattr("mmdiff.convert.tensors.BLOCK", 64)  # several reads
    array = np.random.RandomState(0).standard_normal((7, 5, 3)).astype(np.float32)
    write_weights(tmp_path / "a.safetensors", {"a": array})
    tensor = open_weights(tmp_path / "a.safetensors")["a"]
    for index in ((), (slice(2, 6),), (slice(0, 7), slice(1, 4)), (slice(3, 3),), (slice(1, 6), slice(0, 5), slice(1, 2))):
        np.testing.assert_array_equal(tensor.read(index), array[index])
        np.testing.assert_array_equal(tensor.transpose(2, 0, 1).read(index), array.transpose(2, 0, 1)[index])
        np.testing.assert_array_equal(tensor.part(1, 4, 1).astype(np.float16).read(index), array[:, 1:4].astype(np.float16)[index])
        np.testing.assert_array_equal(stack([tensor, tensor.map(np.negative)]).read(index), np.stack([array, -array])[index])


@pytest.mark.parametrize("types, wanted", [
    (("float16", "float32"), "float32"), (("float64", "bfloat16"), "float64"), (("bfloat16", "float16"), "float32"),
    (("bfloat16",) * 2, "bfloat16"), (("float8_e5m2", "float16"), "float16"), (("float32", "int8"), "int8")])  # fmt: skip
def test_parts_of_different_types_are_joined_in_the_widest(types, wanted):
    """A part that is no float makes the whole none, which is refused where it is used."""
    values = np.array([1 / 3, 2.0])
    parts = [Tensor.of(values.astype(jnp.dtype(dtype))) for dtype in types]
    found = stack(parts)
    assert found.dtype == wanted and found.read().dtype == wanted
    for row, part in zip(found.read(), parts):
        np.testing.assert_array_equal(row, part.read().astype(jnp.dtype(wanted)))
