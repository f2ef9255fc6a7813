"""The kinds of published networks: what a kind's network, configuration, preprocessing and licence are."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from mmdiff.encoders import preprocessing as images
from mmdiff.encoders.preprocessing import Preprocessing


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of published network.

    Attributes:
      network: "module.Class" in `mmdiff.encoders`; the module's CONFIGS are published configurations by name.
      names: what config.json calls it: its `_class_name` (diffusers) or `model_type` (transformers).
      licence: of the weights that are in use.
      preprocessing: network -> what is done to images, unless a preprocessor_config.json lies beside the weights.
    """

    network: str
    names: tuple[str, ...]
    licence: str
    preprocessing: Callable[[Any], Preprocessing] | None = None

    @property
    def module(self) -> Any:
        return importlib.import_module(f"mmdiff.encoders.{self.network.partition('.')[0]}")

    @property
    def cls(self) -> type[nn.Module]:
        return getattr(self.module, self.network.partition(".")[2])


def _always(preprocessing: Preprocessing) -> Callable[[Any], Preprocessing]:
    return lambda net: preprocessing


def _of_its_size(preprocessing: Preprocessing) -> Callable[[Any], Preprocessing]:
    return lambda net: dataclasses.replace(preprocessing, size=net.image_size)


CLIP_LICENCE = "OpenAI: MIT, with a statement of use in the model card; LAION: MIT"
KL_LICENCE = (
    "sd-vae-ft-ema, sd-vae-ft-mse, sdxl-vae, VA-VAE: MIT; Stable Diffusion 1.x: CreativeML Open RAIL-M, 2.x and XL: Open RAIL++-M; "
    "3: Stability Community; FLUX.1-schnell: Apache-2.0, FLUX.1-dev: non-commercial"
)
KINDS: dict[str, Kind] = {
    "autoencoder_kl": Kind("autoencoder_kl.AutoencoderKL", ("AutoencoderKL",), KL_LICENCE, _always(images.AUTOENCODER)),
    "autoencoder_tiny": Kind("autoencoder_tiny.AutoencoderTiny", ("AutoencoderTiny",), "MIT", _always(images.AUTOENCODER)),
    "vq_model": Kind("vq_model.VQModel", ("VQModel",), "VQGAN and LlamaGen: MIT", _always(images.AUTOENCODER)),
    "clip_text": Kind("clip.CLIPText", ("clip", "clip_text_model"), CLIP_LICENCE),
    "clip_vision": Kind("clip.CLIPVision", ("clip", "clip_vision_model"), CLIP_LICENCE, _of_its_size(images.CLIP)),
    "clip": Kind("clip.CLIP", ("clip",), CLIP_LICENCE, _of_its_size(images.CLIP)),
    "siglip_text": Kind("siglip.SigLIPText", ("siglip", "siglip_model", "siglip_text_model"), "Apache-2.0"),
    "siglip_vision": Kind(
        "siglip.SigLIPVision", ("siglip", "siglip_model", "siglip_vision_model"), "Apache-2.0", _of_its_size(images.SIGLIP)),
    "siglip": Kind("siglip.SigLIP", ("siglip", "siglip_model"), "Apache-2.0", _of_its_size(images.SIGLIP)),
    "dinov2": Kind("dinov2.DINOv2", ("dinov2", "dinov2_with_registers"), "Apache-2.0", _always(images.DINOV2)),
    "t5": Kind("t5.T5Encoder", ("t5",), "Apache-2.0"),
    "sentence_bert": Kind("sentence_bert.SentenceBERT", ("bert",), "Apache-2.0"),
    "inception": Kind("inception.Inception", (), "Apache-2.0", _always(images.INCEPTION)),
    "efficientnet_lite0": Kind("efficientnet_lite0.EfficientNetLite0", (), "Apache-2.0", _always(images.EFFICIENTNET_LITE0)),
}  # fmt: skip
