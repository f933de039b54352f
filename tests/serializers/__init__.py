"""Files: written, read, damaged."""
