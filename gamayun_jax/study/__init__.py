"""Studies: registered comparisons of runs, over seeds, at equal exposure."""
