"""Published weights in and out: files (safetensors, PyTorch's without PyTorch), keys, and the layouts of this library's networks."""

from mmdiff.exports import lazily

__all__, __getattr__, __dir__ = lazily(
    __name__,
    tensors="Tensor",
    weight_files="open_weights",
    weight_writer="write_weights",
)
