"""The one training loop, for DNA and audio: see `mambagen.training.loop.train` and docs/training.md."""
