"""Evaluation: the harness's tasks on our models, evaluation under intervention, answers for a judge.

Importing this package imports no harness; `adapter` and `harness` are the modules that do.
"""
