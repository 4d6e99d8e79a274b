"""Rendered hands: anatomy, the posed surface, the scene, the sensor and the data sets' files."""
