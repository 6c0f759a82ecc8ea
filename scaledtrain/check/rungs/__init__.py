"""One file for each rung: a function of a subject that returns a verdict."""
