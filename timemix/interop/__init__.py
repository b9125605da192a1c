"""Models of other programs: import of published weights, and export in the formats of other programs."""
