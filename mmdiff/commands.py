"""What the commands do: each checks its arguments, calls the library and prints. Nothing here imports jax before it is needed."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping

from mmdiff import checks, console, files, remote, runs, shipped_configs
from mmdiff import config as configs
from mmdiff.errors import UserError
from mmdiff.remote import RemotePath
from mmdiff.training import distributed


def train(args: argparse.Namespace) -> None:
    _prepare()
    config, module = configs.load(args.config, args.overrides)
    where = distributed.address(args.coordinator, args.processes, args.process)
    _writable("--workdir", args.workdir)
    distributed.check_one_writer(args.workdir, args.distributed or bool(where))
    if args.distributed or where:
        distributed.start(**where)
    from mmdiff.training import loop, remote_runs

    with configs.blaming(config, module, args.overrides), remote_runs.trained_at(args.workdir) as workdir:
        loop.train(configs.build(config, module), config, workdir, args.profile)


def bench(args: argparse.Namespace) -> None:
    _keep_memory()  # as train does
    config, module = configs.load(args.config, args.overrides)
    where = distributed.address(args.coordinator, args.processes, args.process)
    _writable("--json", args.json, folder=False)
    if args.peer:  # on a GPU jax would take three quarters of the memory at once
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.distributed or where:
        distributed.start(**where)
    import jax

    from mmdiff.training import bench as benchmark

    jax.config.update("jax_enable_compilation_cache", False)  # compilation is timed
    with configs.blaming(config, module, args.overrides):
        found = benchmark.measure(configs.build(config, module), config, steps=args.steps, rounds=args.rounds, peer=args.peer)
    if jax.process_index() == 0:
        console.out(benchmark.table(found))
        _write_json(args.json, found)


def aot(args: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is run: leave an accelerator that is here alone; jax reads it when it is imported
    _writable("--json", args.json, folder=False)
    from mmdiff import aot_reports

    found, text = aot_reports.report(args)
    console.out(text)
    _write_json(args.json, found)


def sample(args: argparse.Namespace) -> None:
    where = _where(args)
    if where is None and _is_spare():
        return
    _prepare()
    if args.format is None:
        for flag, value in {"--batch": args.batch, "--distributed": where is not None}.items():
            if value:
                raise UserError(f"{flag} goes with --format: name the format of a set of images, or leave it out.")
    given = _pairs(args.given)
    _writable("--out", args.out)
    out = files.target(args.out or os.path.join(args.workdir, "samples"))
    with distributed.joined(where):
        _sample(args, given, out)


def _sample(args: argparse.Namespace, given: Mapping[str, str], out: pathlib.Path | RemotePath) -> None:
    run = runs.open_run(args.config, args.workdir, args.overrides, step=args.step)
    for modality in run.experiment.modalities.values():
        getattr(getattr(modality, "decode", None), "open", lambda: None)()  # a decoder that is not there is said before sampling
    steps, guidance, seed = run.settings(args.steps, args.guidance, args.seed)
    if args.classes:
        from mmdiff import sample_sets

        number = args.number or 16
        given = given | sample_sets.classes(run, args.classes, number, seed, {*given, *args.absent})
    else:
        number = args.number
    given, number = run.parse(number, given, args.absent, lazily=args.format is not None)
    _writable("the folder of the samples,", out)
    for text in args.given:
        file = files.target(text.partition("=")[2])
        if _is_overwritten(file.resolve(), out.resolve(), args.format):
            raise UserError(f"--given {text} would be overwritten by what is sampled: name another folder with --out.")
    settings = {"steps": steps, "guidance": guidance, "seed": seed}
    said = f"{number} sample{'s' * (number != 1)} of step {{}} (seed {seed}, {steps} steps, guidance {guidance:g})"
    if args.format:
        from mmdiff import sample_sets

        batch = args.batch or sample_sets.BATCH
        paths = sample_sets.write(run, out, number, given=given, absent=args.absent, **settings, form=args.format, batch=batch)
        if not _is_first():
            return
        console.out(said.format(run.step))
    else:
        if (out / "samples.json").exists():
            raise UserError(f"{out} holds a set of samples: name another folder by --out, or remove it.")
        samples = run.sample(number, given=given, absent=args.absent, **settings)
        console.out(said.format(run.step))
        shown = run.show(samples)
        for name, array in samples.items():
            if name not in shown:
                console.out(f"{name}: vectors {list(array.shape)}, no images and no words: they are in samples.npz alone")
            elif not hasattr(shown[name], "shape"):
                console.out(f"{name}: {' '.join(map(str, shown[name]))}")
        paths = run.write(samples, out)
    for path in paths:
        console.out(path)


def _is_overwritten(file: pathlib.Path | RemotePath, out: pathlib.Path | RemotePath, form: str | None) -> bool:
    """Whether a file or folder that is given is written to, too."""
    if form is not None and (file == out or out / "images" in (file, *file.parents) or file == out / "labels.npy"):
        return True
    return file.name.startswith("samples") and file.parent == out


def _pairs(given: list[str]) -> dict[str, str]:
    """{NAME: VALUE} of --given NAME=VALUE."""
    pairs = [text.partition("=") for text in given]
    names = [name for name, _, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the modality {name} is set twice: use one --given or one --absent for it.")
    return {name: value for name, _, value in pairs}


def evaluate(args: argparse.Namespace) -> None:
    where = _where(args)
    if where is None and _is_spare():
        return
    _prepare()
    with distributed.joined(where):
        if args.samples:
            _evaluate_samples(args)
        else:
            _evaluate_run(args)


def _evaluate_run(args: argparse.Namespace) -> None:
    zeroshot = _zeroshot(args)
    by_vectors = not zeroshot or "zeroshot" in configs.load(args.config, args.overrides)[0].get("eval", {})
    asked = [(f"eval.{name}", value) for name, value in zeroshot.items()] if by_vectors else []
    run = runs.open_run(args.config, args.workdir, [*args.overrides, *asked], step=args.step)
    _writable("--workdir", args.workdir)
    if not by_vectors:
        from mmdiff.evals import diffusion_classifier

        classifier = diffusion_classifier.asked(run.experiment, argparse.Namespace(**{"zeroshot_dir": "", **zeroshot}))
        experiment = dataclasses.replace(run.experiment, evaluators=(classifier, *run.experiment.evaluators))
        run = dataclasses.replace(run, experiment=experiment)
    written = run.evaluate(args.split, reuse=args.reuse and by_vectors)
    if not _is_first():
        return
    console.out(console.table({name: value for name, value in written.items() if isinstance(value, (int, float))}))
    for path in run.report_paths(args.split):
        if isinstance(target := files.target(args.workdir), RemotePath):
            (target / path.name).send(path)
        console.out(target / path.name)


def _evaluate_samples(args: argparse.Namespace) -> None:
    """Measures samples in files, or stores the statistics of their features."""
    _writable("--json", args.json, folder=False)
    _writable("--write-statistics", args.write_statistics, folder=False)
    for flag, out in (("--json", args.json), ("--write-statistics", args.write_statistics)):
        for path in (args.samples, args.reference, args.captions):
            if out and path and os.path.realpath(out) == os.path.realpath(os.path.expanduser(path)):
                raise UserError(f"{flag} {out} would overwrite what is measured: name another file.")
    from mmdiff.evals import clip_scores, image_sets, sample_metrics

    samples = image_sets.open_images(args.samples, args.size or 0)
    reference = image_sets.open_reference(args.reference, args.size or 0) if args.reference else None
    captions = files.lines(files.read_text(args.captions)) if args.captions else None
    if captions is not None and len(captions) != samples.count:
        raise UserError(f"{args.captions} has {len(captions):,} lines for {samples.count:,} samples: give a caption in a line for each.")
    encoder = sample_metrics.open_network(args.network or sample_metrics.DEFAULT, args.weights or "")
    if reference is None:
        sample_metrics.store_statistics(args.write_statistics, samples, encoder)
        if _is_first():
            console.out(args.write_statistics)
        return
    metrics, definitions, convention = sample_metrics.measure_files(samples, reference, encoder, args.paired)
    if captions is not None:
        for into, more in zip((metrics, definitions), clip_scores.clip_metrics(sample_metrics.batches(samples), captions, args.clip)):
            into.update(more)
        convention |= {"clip": args.clip}
    if not _is_first():
        return
    convention |= {"samples_path": args.samples, "reference_path": args.reference}
    console.out(console.table(metrics))
    resize = convention["preprocessing"]
    console.out(
        f"{convention['samples']:,} samples, reference {pathlib.Path(args.reference).name}; {convention['network']} "
        f"({convention['features']}), weights {convention['weights'][:12]}; {resize['resize']} {resize['kernel']} {resize['size']} pixels")
    _write_json(args.json, {"metrics": metrics, "definitions": definitions, "convention": convention})


def _zeroshot(args: argparse.Namespace) -> dict[str, str]:
    """What --zeroshot and its companions set in the config's section eval."""
    options = {"zeroshot": args.zeroshot, "zeroshot_dir": args.zeroshot_dir, "zeroshot_prompts": args.prompts,
               "zeroshot_images": args.zeroshot_images}
    given = {name: str(value) for name, value in options.items() if value is not None}
    if given and not given.get("zeroshot", "").strip():
        flag = next(("--prompts" if name == "zeroshot_prompts" else f"--{name.replace('_', '-')}") for name in given)
        raise UserError(f"{flag} goes with data sets: say which, --zeroshot all, --zeroshot cifar10,food101 or --zeroshot DIR.")
    if given and args.split != "test":
        raise UserError("--zeroshot measures published test sets, on which nothing is to be chosen: leave --split validation out.")
    return given


def cache(args: argparse.Namespace) -> None:
    where = _where(args)
    distributed.check_encodes_alone(args.workdir, where is not None)
    if where is None and _is_spare():
        return
    _prepare()
    if args.workdir is None:
        _cache_published(args, where)
        return
    run = runs.open_run(args.config, args.workdir, args.overrides, step=args.step)
    _writable("--out", args.out)
    _say_cached(args, run.cache(args.out, args.split), run.experiment.cache.holds(args.out, run.step))


def _cache_published(args: argparse.Namespace, where: Mapping[str, str | int] | None) -> None:
    """Encodes a config's data with the published networks that it names, together with other processes if there is a `where`."""
    config, module = configs.load(args.config, args.overrides)
    _writable("--out", args.out)
    if args.step is not None:
        raise UserError("--step is of a run's checkpoint: name the run by --workdir, or leave it out.")
    with distributed.joined(where), configs.blaming(config, module, args.overrides):
        from mmdiff import encoded_caches

        writer = configs.build(config, module).cache
        if getattr(writer, "encoders", None) is None:
            raise UserError(f"{args.config} names no published encoders: give --workdir DIR, the run of a tokenizer or of towers.")
        written = encoded_caches.write(writer, args.out, args.split)
        if _is_first():
            _say_cached(args, written, writer.holds(args.out))


def _say_cached(args: argparse.Namespace, written: bool, holds: str) -> None:
    console.out(f"{'' if written else 'nothing to do: '}{args.out} holds {holds}")


def convert(args: argparse.Namespace) -> None:
    if _is_spare():
        return
    out = {"--out": args.out, "--vae": args.vae, "--step": args.step}
    here = {"--as": args.kind, "--within": args.within}
    if (args.source is None) == (args.to is None):
        raise UserError("convert takes weights in (--from FILE --as KIND) or writes them out (--to LAYOUT --out DIR): give one of both.")
    for flag, value in (out if args.to is None else here).items():
        if value is not None:
            raise UserError(f"{flag} goes with {'--to' if args.to is None else '--from'}: leave it out.")
    for needed, value in (("--as KIND", args.kind),) if args.to is None else (("--out DIR", args.out),):
        if value is None:
            raise UserError(f"convert needs {needed}, too (see mmdiff convert --help).")
    _prepare()
    if args.to is None:
        _writable("--workdir", args.workdir)
        from mmdiff import conversion
        from mmdiff.training import remote_runs

        with remote_runs.trained_at(args.workdir) as workdir:
            said = conversion.import_weights(args.config, workdir, args.source, args.kind, args.overrides, args.within)
        said.append(f"{args.workdir} is a run")
    else:
        run = runs.open_run(args.config, args.workdir, args.overrides, step=args.step)
        _writable("--out", args.out)
        from mmdiff import publishing

        said = publishing.export_weights(run, args.to, args.out, args.vae)
    console.out("\n".join(said))


def show_configs(args: argparse.Namespace) -> None:
    if args.to and not args.name:
        raise UserError("--to says where a copy goes: say of which config, mmdiff configs NAME --to FILE.py.")
    if args.to:
        for path in shipped_configs.copy(args.name, args.to):
            console.out(path)
    elif args.name:
        console.out(shipped_configs.head(args.name))
    else:
        console.out(shipped_configs.table())


# ---- Parts ----


def _prepare() -> None:
    """Sets what has to be set before jax is imported: compiled programs are kept between commands."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(remote.cache_folder("jax")))
    _keep_memory()


def _keep_memory() -> None:
    """Tells glibc to keep freed memory: a step on a CPU takes the same gigabytes each time, and fresh pages cost up to a fifth of it."""
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        mmap_max, trim_threshold = -4, -1  # the numbers of <malloc.h>
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def _where(args: argparse.Namespace) -> dict[str, str | int] | None:
    """Where the other processes are (`distributed.address`), if flags say to join them."""
    flags = args.coordinator, args.processes, args.process
    return distributed.address(*flags) if args.distributed or any(flags) else None


def _is_first() -> bool:
    from mmdiff import hosts

    return hosts.is_first()


def _is_spare() -> bool:
    """Whether a launcher has started this process among others: one samples and evaluates."""
    name, rank = distributed.rank()
    if rank:
        console.say(f"mmdiff: nothing to do in process {rank} ({name}): process 0 alone does this.")
    return rank > 0


def _write_json(path: str | None, found: Mapping[str, object]) -> None:
    if path:
        try:
            files.target(path).write_bytes((json.dumps(configs.plain(found), indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}.") from error


def _writable(flag: str, path: str | os.PathLike | None, folder: bool = True) -> None:
    """Raises UserError, before any work, unless a folder (or a file) `path` can be written. Makes nothing."""
    if path is None:
        return
    remedy = "choose a folder that you can write to" if folder else "choose another file"
    shown, path = checks.short(str(path))[1:-1], files.target(path)
    try:
        if isinstance(path, RemotePath):
            return (path if folder else path.parent).check_writable(flag)
        path = path.absolute()
        if os.path.lexists(path) and not path.exists():
            raise UserError(f"cannot write to {shown} (a link that leads nowhere): {remedy}.")
        if path.exists() and path.is_dir() != folder:
            raise UserError(f"cannot write to {shown} ({'not a directory' if folder else 'a directory'}): {remedy}.")
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        if there == path and not folder:
            with path.open("ab"):
                return
        if not folder and there != path.parent:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if any(len(os.fsencode(part)) > 255 for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {shown} ({error.strerror}): {remedy}.") from error


COMMANDS = {
    "train": train, "sample": sample, "eval": evaluate, "configs": show_configs, "cache": cache, "convert": convert, "bench": bench,
    "aot": aot,
}  # fmt: skip
