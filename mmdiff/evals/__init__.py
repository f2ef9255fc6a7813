"""Evaluation: what any user needs to measure a model, and the report."""

from mmdiff.exports import lazily

__all__, __getattr__, __dir__ = lazily(
    __name__,
    accuracy="confusion denoising_losses eliminated posterior",
    evaluator="EvalResult Figure",
    frechet="Moments frechet_distance frechet_ratio",
    held_out="HeldOut",
    image_features="feature_moments features_of images_of lite0_fd",
    likelihood="bits_per_dim continuous_time discrete_time discretized",
    retrieval="class_vectors recall recalls scores",
)
