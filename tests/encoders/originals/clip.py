"""CLIP by transformers and by open_clip, SigLIP by transformers; in double precision."""

import open_clip
import published
import torch
import transformers

SMALL, IMAGES = published.SMALL["clip"], (2, 3, 32, 32)


def _double(model):
    return published.torch_model(model).double()


def _inputs():
    torch.set_default_dtype(torch.float64)  # transformers makes the causal mask of that type
    return torch.tensor(published.CLIP_IDS), torch.from_numpy(published.normal("px", IMAGES)).double()


def _transformers(model):
    ids, images = _inputs()
    before_last = {}  # what enters the last layers
    for of in ("text", "vision"):
        layer = getattr(model, f"{of}_model").encoder.layers[-1]
        layer.register_forward_pre_hook(lambda _, given, of=of: before_last.update({of: given[0]}))
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=images)
    text, vision = found.text_model_output, found.vision_model_output
    states = {
        "text_hidden": before_last["text"], "text_tokens": text.last_hidden_state,
        "text_tokens_before": model.text_model.final_layer_norm(before_last["text"]).detach(),
        "image_hidden": before_last["vision"], "image_last": vision.last_hidden_state}  # fmt: skip
    embeddings = {"text_embedding": model.get_text_features(ids).detach(), "image_embedding": model.get_image_features(images).detach()}
    return {name: state[..., ::4] for name, state in states.items()} | embeddings | {"logits": found.logits_per_image}


def clip():
    return _transformers(_double(transformers.CLIPModel(transformers.CLIPConfig(**SMALL))))


def siglip():
    return _transformers(_double(transformers.SiglipModel(transformers.SiglipConfig(SMALL["text_config"], SMALL["vision_config"]))))


def _open_clip(custom_text, quick_gelu):
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = _double(kind(**published.SMALL["open_clip"], quick_gelu=quick_gelu))
    ids, images = _inputs()
    with torch.no_grad():
        found = {"text_embedding": model.encode_text(ids), "image_embedding": model.encode_image(images)}
    shapes = {key: list(of.shape) for key, of in model.state_dict().items()}
    return found | {"keys": list(shapes), "shapes": [" ".join(map(str, shape)) for shape in shapes.values()]}


def openclip():
    return _open_clip(False, True)


def openclip_custom_text():
    return _open_clip(True, False)
