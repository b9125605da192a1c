"""Comparisons of variants on equal terms, and tests of claims about these variants."""
