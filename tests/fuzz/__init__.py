"""Damaged input of every kind, drawn from a seed: the program does what it should, or says in one line what is wrong.

    python -m tests.fuzz --kind folders corpora --count 1000 --seed 0

A kind is a function from a seed to a ``Case``. Register it in ``tests.fuzz.kinds``; ``harness`` runs and judges the cases.
"""
