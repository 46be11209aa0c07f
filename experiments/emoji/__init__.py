"""The emoji of four groups of artists: the data set, the judge, the recipe and its figures."""
