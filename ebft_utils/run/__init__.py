"""What surrounds an algorithm's step. May import config, algorithm, models and data.

loop         learning rate, updates, logging, evaluation, saving
checkpoint   checkpoints and resuming
export       the final model
distributed  one process, DDP, FSDP2; signals; errors that all processes agree on
metrics      sums over processes, TensorBoard, metrics.jsonl
memory       the estimate, and advice when memory runs out
preview      the dry run
"""
