"""One device mesh and what is laid over it: data parallelism (FSDP2), activation checkpointing, compilation."""
