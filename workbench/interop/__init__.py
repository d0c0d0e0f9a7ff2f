"""Doors to other frameworks, each imported only when its own module is used."""
