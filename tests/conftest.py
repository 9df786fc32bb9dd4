"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# By default an example that takes 0.2 seconds fails its test: on a busy machine that says nothing about the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
