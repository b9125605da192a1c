"""Evaluation of a trained model on a text: loss, and statistics of the model's layers."""
