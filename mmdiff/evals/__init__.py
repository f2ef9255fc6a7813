"""Evaluation: what any user needs to measure a model, and the report."""

from mmdiff.exports import lazily

__all__, __getattr__, __dir__ = lazily(
    __name__,
    accuracy="confusion denoising_losses eliminated posterior",
    classifiers="agreement classification_accuracy_score svm",
    evaluator="EvalResult Figure",
    frechet="frechet_distance frechet_ratio",
    joint_image_label="JointImageLabel",
    likelihood="bits_per_dim continuous_time discrete_time discretized",
    retrieval="class_vectors recall recalls scores",
)
