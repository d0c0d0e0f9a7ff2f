"""Text for the nano models, written by rules: the same facts and problems in Japanese and in English, from a seed."""
