"""Linear probes, adversarial accuracy against radius, and the sanity checks beside it.

Takes any JAX callable as a model, and never imports the training code.
"""
