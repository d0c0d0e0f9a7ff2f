"""Checkpoints with known answers: mechanisms planted by construction, so that every method can be scored."""
