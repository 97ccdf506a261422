"""Adapters for the frameworks people train with, one file each; each imports its framework when used."""
