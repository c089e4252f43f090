"""Models of the system: closed forms, and what the simulator shares with the testbed."""
