"""Readers and data sets: what turns files into batches of numbers."""
