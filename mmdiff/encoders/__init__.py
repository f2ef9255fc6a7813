"""Published networks that stand beside a diffusion model, frozen: autoencoders, text and image encoders, feature networks."""

from mmdiff.exports import lazily

__all__, __getattr__, __dir__ = lazily(
    __name__,
    autoencoder_kl="AutoencoderKL",
    autoencoder_tiny="AutoencoderTiny",
    clip="CLIP CLIPText CLIPVision",
    clip_tokenizer="CLIPTokenizer read_clip_tokenizer",
    dinov2="DINOv2",
    efficientnet_lite0="EfficientNetLite0 installed_weights",
    inception="Inception",
    preprocessing="Preprocessing",
    published_tokenizers="PublishedTokenizer open_tokenizer",
    published_kinds="KINDS",
    published_networks="Encoder open_encoder split_over",
    sentence_bert="SentenceBERT",
    siglip="SigLIP SigLIPText SigLIPVision",
    t5="T5Encoder",
    vq_model="VQModel",
)
