"""Talking with a model it has never met: terminal, commands, files, and questions from a file."""
