"""The operations a model is written in, and the backends that run them."""
