"""Each kind of layer against its float twin."""
