"""Figures: a frame in, a plotly Figure out. Nothing here shows, saves or computes a statistic."""
