"""Prompting a trained Large Vision Model, and measuring its answers."""
