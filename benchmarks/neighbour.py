"""A neighbour that is bound by memory: copies 256 MB again and again until it is ended.

    taskset -c 1 python benchmarks/neighbour.py

As in STREAM's copy (McCalpin 1995), the arrays are many times the last cache's size.
`all.py --neighbour` keeps one on the last core while benchmarks have the others.
"""

import numpy as np

source = np.ones(32_000_000)
target = np.zeros_like(source)
while True:
    np.copyto(target, source)
