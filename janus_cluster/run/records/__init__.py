"""One frozen type for every file between rooms in a run folder; no other module reads or writes these files.

base.py        Record: the tolerant loader and the atomic writer that all of them share
bundle.py      bundles/<n>/: resolved.json, manifest.json
submission.py  submission.json, status.json, retry.json
attempt.py     logs/attempt_<n>/: attempt.json, stop.json, heartbeats/, versions.json
failure.py     what failed: the class in attempt.json, failures/rank<r>.json of each rank, logs/script_failure.json
verdict.py     preflight/attempt_<n>/verdict*.json
gate.py        preflight/attempt_<n>/: facts, connect, all_reduce, counters, rails
metrics.py     metrics.jsonl, a type for every kind of line
training.py    data.json, bad_data.jsonl, a checkpoint's manifest.json, janus_data.json, evaluation.json,
               simulation.json, episodes.jsonl
"""
