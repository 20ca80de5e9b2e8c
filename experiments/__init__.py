"""Command-line binaries: flags to one frozen configuration, to library calls, to files."""
