"""Readers: what the user has becomes samples."""
