"""What surrounds an algorithm's step. May import config, algorithm, models and data.

loop         learning rate, updates, logging, evaluation, saving
checkpoint   checkpoints and resuming
integrity    what a checkpoint holds, read without trust
export       the final model
folders      a folder that appears whole or not at all
distributed  one process, DDP, FSDP2; signals; errors that all processes agree on
metrics      sums over processes, TensorBoard, metrics.jsonl
memory       the estimate, and advice when memory runs out
preview      the dry run
"""
