"""Ways to make data; part of the repository, not of the package."""
