"""What `mmdiff aot` reports: of training, of the fastest training that is found, of sampling or of encoding."""

from __future__ import annotations

import argparse
from types import ModuleType
from typing import Any

from mmdiff import config as configs
from mmdiff.errors import UserError


def report(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """-> (plain values, the same as text), of the command's arguments."""
    config, module = configs.load(args.config, args.overrides)
    if args.of != "train":
        return _of_inference(args, config, module)
    for flag, value in {"--number": args.number, "--batch": args.batch}.items():
        if value:
            raise UserError(f"{flag} goes with --of sample or --of encode: leave it out.")
    from mmdiff.training import aot, aot_search

    def load(overrides):
        config, module = configs.load(args.config, [*args.overrides, *overrides.items()])
        return config, configs.build(config, module)

    with configs.blaming(config, module, args.overrides):
        if not args.search:
            found = aot.report(load, args.topology, args.slices)
            return found, aot.text(found)
        found = aot_search.search(load, args.topology, args.slices, [key for key, _ in args.overrides], args.search)
    return found, aot_search.text(found, args.config, args.overrides)


def _of_inference(args: argparse.Namespace, config: Any, module: ModuleType) -> tuple[dict[str, Any], str]:
    for flag, value in {"--slices": args.slices > 1, "--search": args.search}.items():
        if value:
            raise UserError(f"{flag} goes with --of train: chips {args.of} on their own.")
    from mmdiff import inference_costs, sample_sets

    with configs.blaming(config, module, args.overrides):
        experiment = configs.build(config, module)
        found = inference_costs.report(config, experiment, args.of, args.topology, args.number or 50_000, args.batch or sample_sets.BATCH)
    return found, inference_costs.text(found)
