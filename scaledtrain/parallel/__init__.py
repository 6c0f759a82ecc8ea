"""A replica laid out over several ranks: each has a piece of it."""
