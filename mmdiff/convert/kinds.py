"""What published weights there are for networks of this library, whose they are, and which network each needs. No weights come along."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mmdiff import nets
from mmdiff.convert import diffusers_dit, dual_dit, published_dit, published_mit, unidiffuser, vq_diffusion
from mmdiff.convert.layouts import Layout
from mmdiff.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of published weights.

    Attributes:
      about: what they are, and whose.
      licence: of the weights, as their authors state it; it goes with what is made of them.
      network: the class that computes their function, with the fields `needs`.
      layout: of the files.
      config: a shipped config that builds such a network.
      stated: `net -> {key: value}`, what a config.json beside the weights must agree with where it says so.
      classes: what diffusers may call them there.
      alone: diffusers' layout and `(net, tensors) -> config.json` of a network that is written without the rest of its pipeline.
    """

    about: str
    licence: str
    network: type
    needs: Mapping[str, Any]
    layout: Layout
    config: str
    stated: Callable[[Any], Mapping[str, Any]] = lambda net: {}
    classes: tuple[str, ...] = ()
    alone: tuple[Layout, Callable[[Any, Any], Mapping[str, Any]]] | None = None


DIT_LICENCE = "CC BY-NC 4.0 for Meta's weights: not for commercial use; other weights as their authors state"
DIT_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter by earlier versions
KINDS = {
    "dit": Kind(
        "DiT (Peebles & Xie 2023), its own files or diffusers' of the same weights", DIT_LICENCE, nets.DiT, published_dit.NEEDS["dit"],
        dataclasses.replace(published_dit.DIT, read=diffusers_dit.DIFFUSERS.read), "imagenet256/dit_xl2", diffusers_dit.stated,
        DIT_CLASSES),
    "diffusers-dit": Kind(
        "DiT as diffusers computes it: other frequencies and epsilons, for weights that were trained there", DIT_LICENCE, nets.DiT,
        diffusers_dit.NEEDS, diffusers_dit.DIFFUSERS, "imagenet256/dit_xl2", partial(diffusers_dit.stated, epsilon=True), DIT_CLASSES),
    "sit": Kind(
        "SiT (Ma et al. 2024)", "MIT for the code; the authors state none for the weights: ask them before you pass them on", nets.DiT,
        published_dit.NEEDS["sit"], published_dit.SIT, "imagenet256/sit_xl2"),
    "repa": Kind(
        "SiT aligned with DINOv2 (REPA, Yu et al. 2025)", "MIT for the code; of the weights, see their page", nets.DiT,
        published_dit.NEEDS["repa"], published_dit.REPA, "imagenet256/repa_xl2"),
    "lightningdit": Kind(
        "LightningDiT (Yao et al. 2025)", "MIT for the code; of the weights, see their page", nets.DiT,
        published_dit.NEEDS["lightningdit"], published_dit.LIGHTNING, "imagenet256/lightning_xl1"),
    "jit": Kind(
        "JiT (Li & He 2025)", "as the authors state on their page", nets.DiT, published_dit.NEEDS["jit"], published_dit.JIT,
        "imagenet256/jit_b16"),
    "imf": Kind(
        "improved MeanFlow (Geng et al. 2025), the weights of its PyTorch branch", "MIT for the code; of the weights, see their page",
        nets.MiT, published_mit.NEEDS, published_mit.IMF, "imagenet256/meanflow_xl2"),
    "vq-diffusion": Kind(
        "VQ-Diffusion (Gu et al. 2022) and CDCD (Zhu et al. 2023), their own files or diffusers'", "MIT for Microsoft's code and weights",
        nets.TokenTransformer, vq_diffusion.NEEDS, vq_diffusion.VQ_DIFFUSION, "cdcd/imagenet256_class", vq_diffusion.stated,
        ("Transformer2DModel",), (vq_diffusion.VQ_DIFFUSION_DIFFUSERS, vq_diffusion.diffusers_config)),
    "unidiffuser": Kind(
        "UniDiffuser's U-ViT (Bao et al. 2023), v0 or v1, its own file or diffusers'",
        "AGPL-3.0 for the authors' code; of the weights, see their page", nets.UViT, unidiffuser.NEEDS,
        unidiffuser.UNIDIFFUSER, "joint/unidiffuser", unidiffuser.stated, ("UniDiffuserModel",),
        (unidiffuser.UNIDIFFUSER_DIFFUSERS, unidiffuser.diffusers_config)),
}  # fmt: skip
STARTS = {  # networks that begin as the published one and have more; the rest is fresh
    "dit": Kind(KINDS["dit"].about, DIT_LICENCE, nets.DualStream, dual_dit.NEEDS, dual_dit.DUAL, "diffdis/sd_scale", dual_dit.stated,
                DIT_CLASSES)}


def differences(kind: Kind, net: Any) -> dict[str, tuple[Any, Any]] | None:
    """The fields of a network that a kind needs otherwise: name -> (here, needed); None for a network of another class."""
    if not isinstance(net, kind.network):
        return None
    here = {name: getattr(net, name) for name in kind.needs}
    if "mlp_norm_eps" in here and here["mlp_norm_eps"] is None:
        here["mlp_norm_eps"] = net.norm_eps
    return {name: (here[name], needed) for name, needed in kind.needs.items() if here[name] != needed}


def check_network(name: str, net: Any, config: str) -> Kind:
    """The kind of a name. Raises UserError unless the network of a config computes its function."""
    if name not in KINDS:
        raise UserError(f"there are no weights of the kind {name!r}: choose one of {', '.join(KINDS)} or mmdiff.")
    kind = STARTS[name] if name in STARTS and isinstance(net, STARTS[name].network) else KINDS[name]
    wrong = differences(kind, net)
    if wrong is None:
        raise UserError(
            f"{config} has the network {type(net).__name__}, and weights of the kind {name} are for {kind.network.__name__}: take a config "
            f"such as {kind.config}.")
    if wrong:
        listed = ", ".join(f"{field}={needed} (here {found})" for field, (found, needed) in wrong.items())
        raise UserError(
            f"weights of the kind {name} are for a network with {listed}: set these as --config.model.{next(iter(wrong))}=..., or take "
            f"a config such as {kind.config}.")
    return kind


def check_config(kind: Kind, config: Any, net: Any, name: str) -> None:
    """Raises UserError if the config.json beside the weights `name` is of another network than `net`."""
    stated = kind.stated(net)
    called = (config.get("_class_name") or config.get("model_type")) if isinstance(config, Mapping) else None
    if stated and called not in (None, *kind.classes):
        raise UserError(f"{name} is of {str(called)[:60]} by its config.json, not {kind.about}: name other weights, or another kind.")
    for key, value in stated.items():
        if isinstance(config, Mapping) and config.get(key, value) != value:
            raise UserError(f"{name} has {key} {config[key]!r} in its config.json, and the network of the config {value!r}.")


def kind_of(net: Any) -> str | None:
    """The first kind whose function a network computes."""
    return next((name for name, kind in KINDS.items() if differences(kind, net) == {}), None)
