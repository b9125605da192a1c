"""Pictures, tables and statistics."""
