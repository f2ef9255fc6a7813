"""Published weights in and out: files (safetensors, PyTorch's without PyTorch), keys, and the layouts of this library's networks."""
