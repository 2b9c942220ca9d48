"""Which images and boxes count as labelled."""
