"""How long it takes: requests timed one after another and interleaved, sweeps, and whether the machine was quiet."""
