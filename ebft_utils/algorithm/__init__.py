"""The algorithm: pure functions, tensors in and tensors out. No configuration, no files, no accelerator.

May import nothing else of this project.

architecture  reach of attention, head and layers of a model, as numbers
strided       the packed layout of document and rollouts: anchors, mask, log-probs
rows          the other layout: a row for each completion, for models that take no mask
decoding      rollouts of all anchors at once: prefill, KV cache, sampling
attention     attention over that layout without its empty cells (sdpa)
flex          the same with FlexAttention, on GPUs
features      hidden states of the frozen network -> one vector for each rollout
rewards       whitening, alignment, diversity, CFM (eq 2, 7 to 9), advantages (eq 94)
losses        log-probs without full logits, policy gradient, cross-entropy
"""
