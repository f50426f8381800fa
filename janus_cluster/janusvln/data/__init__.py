"""From data sets to batches. Nothing is imported here: everything but encode, lengths, tokenizer and dataset works
without torch and transformers.

samples.py   a sample, of any file format                          formats/     the file formats, one file each
history.py   which earlier frames a sample shows                  store.py     the index of a data set: columns on disk
indexing.py  the index made by several processes, kept, renewed   index_tasks.py, pool.py  what one of them does
image_check.py  is a file a frame, and how large                  usable.py  which samples can be used; image tokens
split.py     which walks are held out                             desk.py    a look at the data before a job is queued
table.py     samples of indexes, made when asked for              index.py     roots -> training and held-out samples
images.py    file -> resized uint8 pixels and Qwen's grid         prompt.py    the exact text of prompt and target
encode.py    text and grids -> ids, labels, weights, segments     tokenizer.py real and tiny tokenizers, export files
lengths.py   token counts of all samples                          dataset.py   torch Dataset and collate
sampler.py   which samples make a step                            demo.py      generated walks through world/
"""
