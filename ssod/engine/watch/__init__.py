"""What watches a run and changes nothing in it. A new observer is a file here and a line in observers.py."""
