"""What the binaries share at their edge: flags, signals, work directories, devices, processes."""
