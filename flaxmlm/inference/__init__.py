"""Trained models, ready to be used."""
