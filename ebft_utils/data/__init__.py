"""From a dataset to batches. May import config and algorithm.

sources     where rows come from: hub, files, folders, what every machine has
transforms  a row -> text, or prompt and completion; your own function has the same form
documents   text -> tokens, and which of them are learnt
tables      whole datasets of documents, tokenised once and cached
streams     datasets that are read and tokenised while training
rows        documents -> rows; which rows a step trains on, which are held out
batches     the batches of strided mode, and the random numbers of rollouts
prompts     the batches of structured mode, and conversations turn by turn
"""
