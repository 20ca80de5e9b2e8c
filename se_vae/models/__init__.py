"""Encoders and decoders as Flax modules, and the VAE that joins a pair of them."""
