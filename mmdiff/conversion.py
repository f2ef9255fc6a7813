"""Runs made of published weights: what `mmdiff convert --from` does (`publishing` is the way back).

    import_weights("imagenet256/dit_xl2", "runs/dit", "DiT-XL-2-256x256.pt", "dit")     # then sample, eval, config.train.start=runs/dit

A run made so has WORKDIR/source.json: what the weights are, their licence, and the file. It goes with all that is written of it.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax

from mmdiff import config as configs
from mmdiff import files as readers
from mmdiff import former_names
from mmdiff.convert import kinds, layouts, state_dicts
from mmdiff.convert.weight_files import open_weights
from mmdiff.data.order import ORDER_VERSION
from mmdiff.errors import UserError
from mmdiff.keys import key_of
from mmdiff.training import averaged_weights, checkpoints, lock, run_metadata, sharding

OWN = "mmdiff"  # the kind and layout of the library's own parameters, by path


def import_weights(
    config: str, workdir: str | os.PathLike, path: str | os.PathLike, kind: str, overrides: Sequence[tuple[str, str]] = (),
    within: str | None = None,
) -> list[str]:
    """Makes a run of published weights, one checkpoint of step 0; -> what is to be said of them.

    Args:
      config: a shipped config by name, or the path of a file, that builds the network of the weights.
      workdir: the folder of the run; it has no checkpoints yet.
      path: a file, or a folder of diffusers (of the transformer or the whole pipeline).
      kind: one of `kinds.KINDS`, or "mmdiff" for what `publishing.export_weights` has written for this library.
      overrides: dotted keys and values of the config.
      within: the dictionary of a PyTorch checkpoint that is meant; by default the averaged weights, where there are any.

    Raises:
      UserError: nothing is written then. The config builds another network than the weights need, or they are not of this kind or size.
    """
    _check_empty(workdir)
    values, module = configs.load(config, overrides)
    path = readers.expand(path)
    own = _own_config(path) if kind == OWN else {}
    if own:  # as a run that is opened: its own values, but for the overrides
        here = configs.flatten(values)
        asked = {key: here[key] for key, _ in overrides}
        configs.put(values, former_names.keys(configs.flatten(own["config"]), here))
        configs.put(values, asked)
    with configs.blaming(values, module, overrides):
        experiment = configs.build(values, module)
        source = None if own else kinds.check_network(kind, experiment.net, config)
        abstract = averaged_weights.averages_of(experiment, sharding.make_mesh({"fsdp": -1}))
    if (path / "model_index.json").is_file():  # a pipeline
        parts = [path / part for part in ("transformer", "unet") if (path / part).is_dir()]
        if not parts:
            raise UserError(f"{path} is a pipeline without a folder transformer or unet: name the folder or file of the network's weights.")
        path = parts[0]
    if source is not None and (path / "config.json").is_file():
        kinds.check_config(source, readers.read_json(path / "config.json"), experiment.net, str(path))
    weights = open_weights(path, within)

    def place(path, tensor, leaf):
        return tensor.put(leaf.sharding)

    if own:
        params, fresh = _own_params(abstract, weights, str(path)), []
    else:
        params = {"params": layouts.load(source.layout, experiment.net, abstract["params"], weights, str(path), place)}
        params, fresh = _completed(params, experiment, values.seed, abstract)
    count = sum(tensor.size for tensor in weights.values())
    licence = own.get("source", {}).get("licence", "that of whoever trained them") if own else source.licence
    noted = own.get("source") or {"kind": kind, "about": source.about if source else "weights of this library", "licence": licence}
    noted = noted | {"file": str(path), "tensors": len(weights), "numbers": count}
    with lock.held(workdir), checkpoints.Checkpoints(workdir, keep=1) as saved:
        _check_empty(workdir)  # another conversion may have ended meanwhile
        run_metadata.write_config(workdir, values)
        found = {run_metadata.SOURCE: noted, "data.json": own.get("data"), "dependencies.json": own.get("dependencies")}
        with run_metadata.writing(workdir):
            for file, content in found.items():
                if content:
                    readers.write_json(pathlib.Path(workdir) / file, content)
        meta = {"position": 0, "order": ORDER_VERSION, "train_seconds": 0.0, "compile_seconds": 0.0, "metrics": {}}
        saved.save_averages(params, meta)
    types = ", ".join(sorted({str(tensor.dtype) for tensor in weights.values()}))
    said = [f"{len(weights)} tensors, {count:,} numbers ({types}): {noted['about']}", f"licence: {licence}"]
    return [*said, f"without published weights, they begin afresh: {', '.join(fresh)}"] if fresh else said


def _completed(params: Any, experiment: Any, seed: int, abstract: Any) -> tuple[Any, list[str]]:
    """-> (parameters, the modules that are new): what published weights lack is that of a run that begins with the seed."""
    found, wanted = flax.traverse_util.flatten_dict(params), flax.traverse_util.flatten_dict(abstract)
    if not (fresh := [path for path in wanted if path not in found]):
        return params, []
    init = jax.jit(experiment.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))
    found = flax.traverse_util.flatten_dict(init(jax.random.split(key_of(seed))[0])) | found
    return flax.traverse_util.unflatten_dict(found), list(dict.fromkeys("/".join(path[1:-1]) or path[-1] for path in fresh))


def _check_empty(workdir: str | os.PathLike) -> None:
    if run_metadata.steps(run_metadata.checkpoint_folder(workdir)):
        raise UserError(f"{workdir} holds a run already: choose another workdir.")


def _own_config(folder: pathlib.Path) -> dict[str, Any]:
    found = readers.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not isinstance(found, Mapping) or found.get("format") != OWN or not isinstance(found.get("config"), Mapping):
        raise UserError(f"{folder} is no folder that `mmdiff convert --to {OWN}` has written: name one, or another kind.")
    for name in ("data", "dependencies", "source"):
        if not isinstance(found.get(name, {}), Mapping):
            raise UserError(f"{folder / 'config.json'} states no {name} that mmdiff convert has written: copy it again.")
    return dict(found)


def _own_params(abstract: Any, weights: Mapping[str, Any], name: str) -> Any:
    leaves = flax.traverse_util.flatten_dict(abstract)
    there, here = ({path: tuple(leaf.shape) for path, leaf in of.items()} for of in (weights, {"/".join(p): x for p, x in leaves.items()}))
    wrong = [key for key in {**here, **there} if there.get(key) != here.get(key)]
    if wrong:
        listed = ", ".join(f"{key} ({there.get(key, 'absent')} there, {here.get(key, 'absent')} here)" for key in wrong[:5])
        raise UserError(f"{name} holds another network than the config builds: {listed}{f' and {len(wrong) - 5} more' * (len(wrong) > 5)}.")
    state_dicts.check_floats({key: weights[key] for key in here}, name)
    found = {}
    for path, leaf in leaves.items():
        tensor = weights["/".join(path)].astype(leaf.dtype)
        found[path] = state_dicts.finite(tensor, f"{name} has values that are not finite, of {'/'.join(path)}").put(leaf.sharding)
    return flax.traverse_util.unflatten_dict(found)

