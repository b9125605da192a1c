"""Language models: one folder an architecture, beside what all of them share."""
