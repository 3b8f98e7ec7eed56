"""The engines that `benchmarks/engines.py` holds side by side, one file each, and what makes their files; the
quantizers of `benchmarks/weights_alone.py`.

Files named `*_worker.py` run in fresh processes, those of the peers with a Python of their own that need not have
Trilemma: they read a neutral dump of the weights (see `dump.py`) and import nothing of ours.
"""
