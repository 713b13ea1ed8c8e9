"""How the embedded corpus and tasks are made, from public packages."""
