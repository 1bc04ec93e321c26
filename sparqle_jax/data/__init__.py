"""Recordings and their texts: data sets, and batches of them."""
