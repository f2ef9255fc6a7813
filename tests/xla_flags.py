"""How tests compile: most of a run is compiling small programs, once each, so their code is cheap to make, not fast.

A gradient takes a sixth of the time that XLA's own choice takes.
"""

import importlib.metadata

CHEAP = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true", "--xla_cpu_parallel_codegen_split_count=1"]
# Later versions do not know it, and neither does libtpu, which ends a process that has it in XLA_FLAGS.
CHEAPEST = ["--xla_cpu_use_fusion_emitters=false"] if importlib.metadata.version("jaxlib").startswith("0.10.") else []
# Collectives of one program in turn: two at once, of eight devices on two cores, can take all threads while both wait for the rest.
IN_TURN = ["--xla_cpu_enable_concurrency_optimized_scheduler=false", "--xla_cpu_collective_call_terminate_timeout_seconds=300"]
DEVICES = "--xla_force_host_platform_device_count=8"
