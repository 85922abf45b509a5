"""The embedded demo: a generated corpus with planted classes and a small model trained on it."""
