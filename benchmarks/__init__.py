"""Measurements of scaledtrain against other loops; see README.md."""
