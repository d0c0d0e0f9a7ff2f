"""Files in and out: checkpoints, tokenizers, prompts, run directories."""
