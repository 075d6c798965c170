"""The algorithm: pure functions, tensors in and tensors out. No configuration, no files, no accelerator; may import nothing else of this project.

strided    the packed layout of document and rollouts: anchors, mask, decoding, log-probs
attention  attention over that layout without the cells that nobody sees (sdpa)
flex       the same with FlexAttention, on GPUs
features   hidden states of the frozen network -> one vector for each rollout
rewards    whitening, alignment, diversity, CFM (eq 2, 7 to 9), advantages (eq 94)
losses     log-probs without full logits, policy gradient, cross-entropy
"""
