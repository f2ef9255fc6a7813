"""Data: sources of examples, their order and loading, modalities, captions, and caches of latents and tokens."""

from mmdiff.exports import lazily

__all__, __getattr__, __dir__ = lazily(
    __name__,
    encoded="Encoded EncodedCache",
    encoded_modalities="EncodedLatents EncodedMaps EncodedTexts EncodedTokens EncodedVectors Sentences",
    latents="LatentSource write_latents",
    loader="batches prefetch",
    named_autoencoders="Autoencoder ImageTokens",
    named_encoders="ImageVectors TextStates",
    named_features="ImagePatches",
    named_tokenizers="CaptionIds NamedTokenizer",
    modalities="Features Images Labels Latents",
    network_cache="CacheWriter network_fingerprint",
    own="OwnData open_arrays open_images",
    sources="ArraySource OneOfSeveral RandomSource Source Subset published",
    token_modalities="ClassMaps Sequences Texts TokenImages",
)
