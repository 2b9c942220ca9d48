"""The data doctor: what is wrong with a set, and how its views look."""
