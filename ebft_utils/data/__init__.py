"""From a dataset to batches. May import config and algorithm.

sources     where rows come from: hub, files, folders, what every machine has
transforms  a row -> text, or prompt and completion; your own function has the same form
documents   text -> tokens, and which of them are learnt
rows        documents -> rows -> the batches of strided mode; which rows a step has
prompts     the batches of structured mode, and conversations turn by turn
"""
