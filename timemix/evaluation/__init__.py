"""What a trained model gives on a text."""
