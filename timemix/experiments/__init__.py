"""Comparisons: variants on equal terms, and the claims that they test."""
