"""Asking a saved model: in a terminal, from a file of questions, and what these share."""
