"""Language models: one folder for each architecture, and the modules that all architectures share."""
