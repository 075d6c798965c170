"""What the training scripts share, in rooms. Each room imports only from the rooms above it (tests/test_rooms.py):

config         every setting and its checks; imports none of the others
algorithm      the mathematics: tensors in, tensors out; imports none of the others
model_files    where a model's files are, and the ordinary copy of a GGUF file
text_decoders  the text decoder of a multimodal checkpoint, and its names outside
models         policy, tokenizer, adapter, feature network
trial          short examples, as the run computes them and as the model itself does
proof          does a model compute what the algorithm takes for granted?
layouts        which layout and attention a run takes
data           datasets -> documents -> rows -> batches
run            the loop, checkpoints, processes, metrics, memory, the dry run
server         the rollout server: requests, weights, completions
"""
