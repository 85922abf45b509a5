"""The embedded demo: a generated corpus with planted classes and a small language model trained on it."""
