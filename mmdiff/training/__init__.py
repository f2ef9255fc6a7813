"""Training: the step, its sharding, checkpoints, the loop, and what to expect of a machine."""

from mmdiff.exports import lazily

__all__, __getattr__, __dir__ = lazily(
    __name__,
    averaged_weights="restore_for_inference",
    checkpoints="Checkpoints",
    loop="train",
    optim="adamw muon",
    sharding="init_sharded_state make_mesh partition_specs shard_batch shardings",
    step="State init_state make_step step_of",
)
