"""Structured mode's rollouts from a vLLM server. May import every other room.

client         requests: completions and scores in token ids, the endpoints that load weights
weight_sync    sending the policy's weights, and proving that they arrived
nccl_transfer  the same from GPU to GPU
rollouts       the completions of a step: from the server, one step ahead, or from the policy itself
"""
