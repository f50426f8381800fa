"""From folders of episodes to batches. Nothing is imported here: demo, index and prompt work without torch.

samples.py   what a sample is, whatever format it came from       episodes.py  the episode-folder format
history.py   which earlier frames a sample shows                  index.py     roots -> training and held-out samples
images.py    file -> resized uint8 pixels and Qwen's grid         prompt.py    the exact text of prompt and target
encode.py    text and grids -> ids, labels, weights, segments     tokenizer.py real and tiny tokenizers, export files
dataset.py   torch Dataset and collate                            demo.py      generated walks, drawn by demo_render.py
"""
