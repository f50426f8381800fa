"""The file formats of data sets, one file each; every one of them gives the same columns.

registry.py      the format of a path                   source.py     a root as the formats see it; fields of JSON
episodes.py      folders of episode folders           records.py    files with a list of records: json, jsonl, gz
json_samples.py  a record is a sample, four texts     annotation.py a record is a conversation
trajectories.py  a record is an episode, its frames are in a folder of their own
walks.py         what names the walk of an episode, for the split
layout.py        the content of a folder that holds no episodes
"""
