"""Statistics of routing: frames in, frames out. No model and no torch here."""
