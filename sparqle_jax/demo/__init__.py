"""The miniature: a world of sentences and synthesised voices in which the whole system fits on a laptop."""
