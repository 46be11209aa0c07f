"""How good it is: measures of what a run writes and draws."""
