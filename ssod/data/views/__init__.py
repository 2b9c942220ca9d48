"""Weak and strong views of an image, on the worker or on the device."""
