"""The approaches: each a way to make a classifier, in one file (a folder where it is large).

A file holds all of an approach: its settings, network, loss, training steps, how its checkpoint is
rebuilt, and what it is in the comparison. `base` says what an approach answers.
"""
