"""How the user starts everything: the command `vitscale`, recipes and launchers."""
