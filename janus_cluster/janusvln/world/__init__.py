"""The generated world: houses that can be walked through, seen and described. numpy only; nothing is imported here.

geometry.py  houses, doors, things, poses: what is where         textures.py  what their surfaces look like
render.py    what a walker sees                                  plan.py      shortest ways
layout.py    random houses of a level                            tasks.py     a walk: house, instruction, actions
words.py     instructions in several phrasings, descriptions of what is seen
episodes.py  walks that a policy makes: frame in, action out, and how they ended
"""
