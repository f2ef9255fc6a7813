"""Damaged and malicious files of weights: one sentence, at once, and nothing that they hold is executed."""

import json
import os
import pickle
import struct
import time

import forged
import numpy as np
import pytest
from forged import called, dictionary, entry, named, older, raw, safetensors, storage, tensor, zipped

from mmdiff.convert import open_weights
from mmdiff.files import FileError

TOUCH = "touch canary"


def with_list_items(operations):
    return b"](" + operations + b"e"


# name -> (operations of the content, what is said); each is tried in both forms.
PICKLES = {
    "a shell command among the weights": (dictionary(weight=tensor(), more=called("os", "system", TOUCH)), "would run os.system"),
    "a shell command for the content": (called("posix", "system", TOUCH), "would run posix.system"),
    "a shell command beside the weights": (dictionary(state_dict=forged.SOUND, args=called("os", "system", TOUCH)), "would run os.system"),
    "eval": (dictionary(weight=called("builtins", "eval", "open('canary', 'w')")), "would run builtins.eval"),
    "exec of Python 2": (dictionary(weight=called("__builtin__", "exec", "open('canary', 'w')")), "would run __builtin__.exec"),
    "a process, by protocol 4": (raw("subprocess") + raw("Popen") + b"\x93" + raw((TOUCH,)) + b"R", "would run subprocess.Popen"),
    "a shell command, by protocol 0": (b"(" + raw(TOUCH) + b"ios\nsystem\n", "would run os.system"),
    "a shell command, as an instance": (b"(" + named("os", "system") + raw(TOUCH) + b"o", "would run os.system"),
    "a shell command, as a new object": (named("os", "system") + raw((TOUCH,)) + b"\x81", "would run os.system"),
    "a name that leads to another module": (called("os.path", "os.system", TOUCH), "would run os.path.os.system"),
    "an import of a module": (called("runpy", "run_path", "canary.py"), "would run runpy.run_path"),
    "code from the network": (called("torch.hub", "load", "a/b", "c"), "is a pickled torch.hub.load, not a dictionary of tensors"),
    "a function among the weights": (dictionary(weight=tensor(), f=called("numpy", "load", "x")), "has numpy.load for 'f'"),
    "a class in the place of a tensor": (dictionary(weight=named("a.b", "C") + b")\x81"), "holds no tensors that are read (a.b.C)"),
    "a rebuilding function as a weight": (dictionary(w=tensor(), f=named("torch._utils", "_rebuild_tensor_v2")), "'f' among its weights"),
    "attributes set on a function": (named("torch._utils", "_rebuild_parameter") + forged.SOUND + b"b", "is a pickled torch._utils."),
    "a tensor alone": (tensor(), "is a single tensor, not a dictionary"),
    "a list": (with_list_items(tensor()), "is a list, not a dictionary"),
    "no tensors": (dictionary(epoch=raw(3)), "holds no tensors"),
    "a number as a key": (b"}(" + raw(3) + tensor() + b"u", "a tensor under 3"),
    "a memo number of gigabytes": (b"]r\xff\xff\xff\x7f", "pickle is damaged"),
    "a memo number of a thousand digits": (b"]p" + b"9" * 1000 + b"\n", "pickle is damaged"),
    "a memo that is not there": (b"h\x07", "pickle is damaged"),
    "nested lists": (b"]" * 100_000 + b"a" * 99_999, "is a list"),
    "nested tuples": (b")" + b"\x85" * 200_000, "is a tuple"),
    "tuples doubled 200 times": (b")" + b"2\x86" * 200, "is a tuple"),
    "operations without end": (b"N0" * 400_000 + b"}", "more than 600,000 operations"),
    "attributes copied over and over": (
        named("argparse", "Namespace") + b")R" + b"}q\1(" + b"".join(raw(f"a{i}") + b"N" for i in range(5000)) + b"u0" + b"h\1b" * 50_000,
        "more than 600,000 operations"),
    "a text longer than the file": (b"X\xff\xff\xff\x7fabc", "pickle is damaged"),
    "a text of 2^62 bytes": (b"\x8d" + struct.pack("<Q", 2**62) + b"abc", "pickle is damaged"),
    "a number of many digits": (b"I" + b"9" * 100_000 + b"\n", "pickle is damaged"),
    "an empty stack": (b"00a", "pickle is damaged"),
    "a mark that is missing": (b"}u", "pickle is damaged"),
    "a mark for a value": (b"}(s", "pickle is damaged"),
    "half a pair": (b"}(" + raw("a") + b"u", "pickle is damaged"),
    "an extension of copyreg": (b"\x82\x01", "what the pickle of a checkpoint does not do"),
    "a buffer from outside": (b"\x97", "what the pickle of a checkpoint does not do"),
    "a reference as text": (b"Pabc\n", "what the pickle of a checkpoint does not do"),
    "an unknown operation": (b"\xff", "pickle is damaged"),
    "a reference to something else": (raw(("module", "a")) + b"Q", "refers to something other"),
    "a tensor beyond its storage": (dictionary(weight=tensor(offset=1)), "beyond its storage of 6"),
    "strides beyond the storage": (dictionary(weight=tensor(strides=(300, 1))), "beyond its storage of 6"),
    "negative strides": (dictionary(weight=tensor(offset=5, strides=(-3, -1))), "no sizes"),
    "a negative offset": (dictionary(weight=tensor(offset=-1)), "no sizes"),
    "a negative size": (dictionary(weight=tensor(shape=(-2, -3))), "no sizes"),
    "a size that is no number": (dictionary(weight=tensor(shape=(2.0, 3))), "no sizes"),
    "strides of another length": (dictionary(weight=tensor(strides=(1,))), "pickle is damaged"),
    "terabytes of one number": (dictionary(weight=tensor(shape=(10**12,), strides=(0,))), "beyond its storage of 6"),
    "a size of 2^62": (dictionary(weight=tensor(shape=(2**62, 2**62), strides=(0, 0))), "beyond its storage of 6"),
    "a thousand dimensions": (dictionary(weight=tensor(shape=(1,) * 1000, strides=(1,) * 1000)), "no sizes"),
    "a storage of two sizes": (dictionary(a=tensor(), b=tensor(of=storage(count=7))), "describes its storage '0' in two ways"),
    "a quantized storage": (dictionary(weight=tensor(of=storage("torch QInt8Storage"))), "a kind that is not read (torch.QInt8Storage)"),
    "a type that is not known": (
        dictionary(weight=tensor(function="_rebuild_tensor_v3", dtype=named("torch", "int7"))), "a type that is not read (int7)"),
    "a storage in the place of a tensor": (dictionary(weight=storage()), "holds no tensors"),
}  # fmt: skip
BOTH = [(f"{form}: {name}", make(operations), message) for name, (operations, message) in PICKLES.items()
        for form, make in (("zip", zipped), ("older", older))]  # fmt: skip


def with_bytes(content, position, new):
    return content[:position] + new + content[position + len(new) :]


def directory_offset(content):
    """Where the central directory's first entry has the offset of the first file."""
    return content.index(b"PK\1\2") + 42


def overlapping():
    """One storage of a megabyte that a thousand entries of the directory refer to: a gigabyte in all."""
    count = 1000
    large, size = b"\0" * 2**20, 2**18
    operations = dictionary(**{f"w{i}": tensor(shape=(size,), strides=(1,), of=storage(key=str(i), count=size)) for i in range(count)})
    content = zipped(operations, {"0": large})
    start, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    entries = content[start:end].split(b"PK\1\2")[1:]
    of = next(e for e in entries if b"data/0" in e)
    names = [f"archive/data/{i}".encode() for i in range(1, count)]
    entries += [of[:24] + struct.pack("<H", len(name)) + of[26:42] + name for name in names]
    directory = b"".join(b"PK\1\2" + e for e in entries)
    return content[:start] + directory + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), start, 0)


ARCHIVES = [
    ("a storage that is too small", zipped(storages={"0": forged.NUMBERS[:20]}), "has 20 bytes for 24"),
    ("a storage that is too large", zipped(storages={"0": forged.NUMBERS * 2}), "has 48 bytes for 24"),
    ("no storage", zipped(storages={}), "lacks the storage '0'"),
    ("a storage of another folder", zipped(dictionary(weight=tensor(of=storage(key="../../0")))), "lacks the storage '../../0'"),
    ("a zip bomb", zipped(storages={"0": b"\0" * 2**27}, compressed=("data/0",)), "compressed or encrypted"),
    ("a compressed pickle", zipped(compressed=("data.pkl",)), "compressed or encrypted"),
    ("a big-endian machine", zipped(more={"byteorder": b"big"}), "big-endian"),
    ("a TorchScript program", zipped(more={"code/__torch__.py": b"", "constants.pkl": b""}), "TorchScript"),
    ("another zip file", zipped(more={"word/document.xml": b""}, top=".").replace(b"data.pkl", b"data.xml"), "another kind"),
    ("cut short", zipped()[:-30], "cut short"),
    ("cut in its storages", zipped()[:200], "cut short"),
    ("a pickle that is cut short", zipped(pickled=b"\x80\x02}q"), "pickle is damaged"),
    ("an empty pickle", zipped(pickled=b""), "pickle is damaged"),
    ("entries beyond the file", with_bytes(zipped(), directory_offset(zipped()), b"\xff\xff\xff\x7f"), "cut short or damaged"),
    ("a local header that is none", with_bytes(zipped(), 0, b"PK\3\4" + b"\xff" * 26), "cut short or damaged"),
    ("storages one upon another", overlapping(), "claims more than it holds"),
    ("older: another number", older(magic=7), "another kind"),
    ("older: a big-endian machine", older(little=False), "big-endian"),
    ("older: a storage of another size", older(count=7), "another size"),
    ("older: a storage of 2^62 numbers", older(dictionary(weight=tensor(of=storage(count=2**62))), count=2**62), "cut short"),
    ("older: cut short", older()[:-4], "cut short"),
    ("older: cut in its pickles", older()[:60], "pickle is damaged"),
    ("older: other storages", older(keys=("0", "1")), "other storages"),
    ("older: storages that are no names", older(keys=(0,)), "other storages"),
    ("a plain pickle", pickle.dumps({"a": np.zeros(3)}, 2), "another kind"),
]


def header(**entries):
    return safetensors(entries)


SAFETENSORS = [
    ("a header of 2^63 bytes", safetensors(b"{}", length=2**63), "a header of 9,223,372,036,854,775,808 bytes"),
    ("a header longer than the file", safetensors(b"{}", length=1000), "a header of 1,000 bytes"),
    ("a header that is cut", safetensors(b'{"a": {"dtype"'), "not valid JSON"),
    ("a header nested 100,000 times", safetensors(b'{"a":' * 100_000), "not valid JSON"),
    ("a header that is not UTF-8", safetensors(b'{"\xff": 1}'), "not UTF-8"),
    ("a key twice", safetensors(b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "a": {}}'), "'a' twice"),
    (
        "a number of many digits",
        safetensors(b'{"a": {"dtype":"F32","shape":[' + b"9" * 9000 + b'],"data_offsets":[0,0]}}'),
        "not valid JSON",
    ),
    ("overlapping tensors", header(a=entry(), b=entry(offsets=(0, 24))), "do not follow"),
    ("tensors that overlap in part", header(a=entry(shape=(4,), offsets=(0, 16)), b=entry(shape=(4,), offsets=(8, 24))), "do not follow"),
    ("a hole", header(a=entry(shape=(2,), offsets=(0, 8)), b=entry(shape=(2,), offsets=(16, 24))), "do not follow"),
    ("bytes behind the tensors", safetensors({"a": entry(shape=(2,), offsets=(0, 8))}), "have 8 bytes and the file has 24"),
    ("cut short", safetensors({"a": entry()})[:-4], "have 24 bytes and the file has 20"),
    ("offsets that run backwards", header(a=entry(offsets=(24, 0))), "does not have -24 bytes"),
    ("negative offsets", header(a=entry(offsets=(-24, 0))), "a shape or place that is none"),
    ("offsets beyond 2^63", header(a=entry(offsets=(2**64, 2**64 + 24))), "a shape or place that is none"),
    ("three offsets", header(a=entry(offsets=(0, 12, 24))), "a shape or place that is none"),
    ("a shape of other size", header(a=entry(shape=(2, 4))), "does not have 24 bytes"),
    ("a shape whose size wraps around", header(a=entry(shape=(2**62, 2**62, 6))), "does not have 24 bytes"),
    ("a negative shape", header(a=entry(shape=(-2, -3))), "a shape or place that is none"),
    ("a shape of fractions", header(a=entry(shape=(2.0, 3))), "a shape or place that is none"),
    ("a shape of truths", header(a=entry(shape=(True, 6))), "a shape or place that is none"),
    ("a shape that is a text", header(a=dict(entry(), shape="23")), "a shape or place that is none"),
    ("a thousand dimensions", header(a=entry(shape=(1,) * 1000)), "a shape or place that is none"),
    ("a type that is not known", header(a=entry("Q7")), "of the type 'Q7'"),
    ("a type that is a list", header(a=entry(["F32"])), "which is not read"),
    ("no type", header(a={"shape": [2, 3], "data_offsets": [0, 24]}), "without a type"),
    ("a tensor that is a number", header(a=3), "without a type"),
    ("no tensors", safetensors({"__metadata__": {"format": "pt"}}, b""), "holds no tensors"),
    ("a list for a header", safetensors(b"[1, 2]"), "no file of weights"),
    ("an empty file", b"", "is an empty file"),
    ("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS"),
    ("a page that says that it is not there", b"<!DOCTYPE html><html>Not found</html>", "no file of weights"),
    ("a tar file of the first versions", b"storages" + b"\0" * 249 + b"ustar" + b"\0" * 250, "no file of weights"),
    ("another format", b"GGUF\3\0\0\0" + b"\0" * 64, "no file of weights"),
]


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in BOTH + ARCHIVES + SAFETENSORS],
                         ids=[case[0] for case in BOTH + ARCHIVES + SAFETENSORS])  # fmt: skip
def test_a_damaged_or_malicious_file_is_one_sentence_and_runs_nothing(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    begun = time.process_time()
    with pytest.raises(FileError) as error:
        open_weights(path)
    assert time.process_time() - begun < 10
    said = str(error.value)
    assert said.startswith(str(path)) and message in said and "\n" not in said and len(said) < len(str(path)) + 300
    assert os.listdir(tmp_path) == ["weights.pt"]


def test_the_payloads_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(forged.program(called("os", "system", TOUCH)))
    assert os.listdir(tmp_path) == ["canary"]


@pytest.mark.parametrize("make", [zipped, older])
def test_what_is_strange_and_does_no_harm_opens_at_once(tmp_path, make):
    """Deep and doubled tuples as keys, which take for ever to hash, and numbers of one hash, beside the weights."""
    deep, doubled = b")" + b"\x85" * 100_000, b")" + b"2\x86" * 100
    alike = b"}(" + b"".join(raw(i * (2**61 - 1)) + b"N" for i in range(20_000)) + b"u"
    beside = b"}(" + deep + b"N" + doubled + b"Nu"
    path = tmp_path / "weights.pt"
    path.write_bytes(make(dictionary(model=forged.SOUND, keys=beside, alike=alike, unknown=called("a.b", "c", "d"))))
    begun = time.process_time()
    weights = open_weights(path)
    assert time.process_time() - begun < 20
    np.testing.assert_array_equal(weights["weight"].read(), np.arange(6, dtype=np.float32).reshape(2, 3))


def parts(folder, by_key, **files):
    """A folder with an index."""
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(by_key if isinstance(by_key, str) else json.dumps({"weight_map": by_key}))
    for name, content in files.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("by_key", "message"),
    [
        ({"a": "{outside}"}, "is no file beside it"),
        ({"a": "../secret.safetensors"}, "is no file beside it"),
        ({"a": "below/secret.safetensors"}, "is no file beside it"),
        ({"a": "..\\secret.safetensors"}, "is no file beside it"),
        ({"a": ".."}, "is no file beside it"),
        ({"a": ""}, "is no file beside it"),
        ({"a": 3}, "is no file beside it"),
        ({"a": ["one.safetensors"]}, "is no file beside it"),
        ({"a": "two.safetensors"}, "no such file"),
        ({"b": "one.safetensors"}, "lacks 'b'"),
        ({"a": "model.safetensors.index.json"}, "no file of weights"),
        ({"a": "a\0b"}, "is no name of a file"),
        ({}, "no index of weights"),
        ("[]", "no index of weights"),
        ('{"weight_map": [1]}', "no index of weights"),
        ("{", "not valid JSON"),
        ('{"weight_map": ' * 100_000, "not valid JSON"),
    ],
)
def test_an_index_names_files_beside_it_and_what_they_hold(tmp_path, by_key, message):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(header(a=entry()))
    if isinstance(by_key, dict):
        by_key = {key: str(secret) if name == "{outside}" else name for key, name in by_key.items()}
    folder = parts(tmp_path / "folder", by_key, one=header(a=entry()))
    with pytest.raises(FileError, match=message) as error:
        open_weights(folder)
    assert "\n" not in str(error.value)


def test_pipes_folders_and_many_files_are_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(FileError, match="is a named pipe"):
        open_weights(tmp_path / "pipe.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="holds no weights"):
        open_weights(tmp_path / "empty")
    for name in "ab":
        (tmp_path / "empty" / f"{name}.safetensors").write_bytes(header(a=entry()))
    with pytest.raises(FileError, match="several files of weights"):
        open_weights(tmp_path / "empty")
    with pytest.raises(FileError, match="no such file"):
        open_weights(tmp_path / "none.pt")
