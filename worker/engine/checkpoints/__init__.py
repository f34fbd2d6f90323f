"""Checkpoints of a job: what the engine writes while it works, so that another engine can go on from there.

archive.py   one file: a JSON header and tensors, in the safetensors format
values.py    plain values and the arguments of a graph as JSON
programs.py  a program as JSON and tensors, whatever earlier steps made of its structure
state.py     all that a job has done so far: finished steps, the program, a training run in the middle
keeper.py    when a checkpoint is written, and where a job goes on
"""
