"""Adapters: frames -> queries. The part that is trained. One file per adapter."""
