"""Evaluation: what any user needs to measure a model, and the report."""

from mmdiff.exports import lazily

__all__, __getattr__, __dir__ = lazily(
    __name__,
    accuracy="confusion denoising_losses eliminated posterior",
    caption_scores="bleu cider_d clip_score",
    clip_scores="clip_metrics",
    evaluator="EvalResult Figure",
    feature_metrics="inception_score kernel_distance precision_recall squared_mmd",
    frechet="Moments frechet_distance frechet_ratio",
    held_out="HeldOut",
    image_features="feature_moments features_of images_of lite0_fd",
    image_pairs="psnr ssim",
    image_sets="open_reference write_statistics",
    likelihood="bits_per_dim continuous_time discrete_time discretized",
    sample_metrics="measure_files open_network",
    sampled_images="SampleMetrics",
    retrieval="class_vectors recall recalls scores",
)
