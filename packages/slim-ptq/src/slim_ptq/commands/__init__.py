"""The larger commands of the command line, one file each; heavy imports are inside them."""
