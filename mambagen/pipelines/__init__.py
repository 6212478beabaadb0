"""The jobs, a file each, that read from top to bottom like what they do."""
