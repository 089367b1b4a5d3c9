"""Judges, builders and servers that several tests use."""
