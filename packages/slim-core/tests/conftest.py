"""Hypothesis without deadlines: how fast a shared machine is says nothing about the code."""

from hypothesis import HealthCheck, settings

settings.register_profile("slim", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slim")
