"""Calibration data and what is measured on it."""
