"""From a dataset to batches. May import config and algorithm.

sources     where rows come from: hub, files, folders, what every machine has
files       local files that are not what their names say
transforms  a row -> text, or prompt and completion; your own function has the same form
messages    conversations in the forms of today's data sets, tool calls included, as one form
templates   the chat template: the text before, between and of a conversation's answers
control     control tokens such as <|im_end|> that stand in a row as text stay text
documents   text -> tokens, and which of them are learnt
tables      whole datasets of documents, tokenised once and cached
streams     datasets that are read and tokenised while training
rows        documents -> rows; which rows a step trains on, which are held out
batches     the batches of strided mode, and the random numbers of rollouts
prompts     the batches of structured mode, and conversations turn by turn
"""
