"""The commands, a file each: parse, call one pipeline, print."""
