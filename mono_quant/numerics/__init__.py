"""Pure functions on tensors and frozen values; nothing here knows a layer or a file."""
